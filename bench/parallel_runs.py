"""What bench/parallel.py times: decode, prefill, the wire and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import parallel_checks
from blockscale.parallel import Group, ParallelExperts
from parallel_clock import Bench, show
from parallel_fit import Layer
from parallel_layers import NUMERICS, Attention, Mlp, Moe, tokens

SOLO = Group()


def groups(b: Bench, direct: Group | None) -> dict[str, Group]:
    """Who carries the traffic."""
    return {"backend": b.world.tp} | ({} if direct is None else {"direct": direct})


def decode(b: Bench, attention: Attention, mlp: Mlp, direct: Group | None) -> list[Layer]:
    """All ranks hold all tokens; two sums a layer, eight layers in one CUDA graph."""
    w, s, rows, layers = b.world, b.s, {}, []
    ways = groups(b, direct) | {"compute": SOLO}
    spread = {name: attention.spread(w, group, tokens_split=False) for name, group in ways.items()}
    both = {name: mlp.tokens_everywhere(w.rank, w.size, group) for name, group in ways.items()}
    mine = slice(*(head * s.value for head in spread["compute"].heads))
    for m in s.decode:
        x, inner = tokens(m, s.hidden, b.device), tokens(m, s.heads * s.value, b.device, 1)
        part = inner[:, mine].contiguous()
        calls: dict[str, Callable[[], object]] = {"one": lambda x=x, i=inner: (attention.whole(x, i), mlp.whole(x))}
        want = attention.whole(x, inner), mlp.whole(x)
        for name in groups(b, direct):
            for what, got, whole in zip(
                ("attention", "MLP"), (spread[name](x, part), both[name](x)), want, strict=True
            ):
                b.agreed.append(parallel_checks.agree(w, f"{what} M={m}, {name}", got, whole, b.say))
        b.keep("agree", b.agreed)
        for name in ways:
            calls[name] = lambda name=name, x=x, part=part: (spread[name](x, part), both[name](x))
        for name, group in groups(b, direct).items():
            sums = torch.zeros(m, s.hidden, device=b.device)
            calls[f"traffic, {name}"] = lambda group=group, sums=sums: [
                group.sum(sums.clone(), torch.bfloat16) for _ in range(2)
            ]
        found = b.us(calls, rounds=15, repeat=8)
        rows[m] = found | {f"speedup, {name}": found["one"] / found[name] for name in groups(b, direct)}
        b.say(f"decode M={m}:", show(rows[m]))
        b.keep("decode", rows)
        layers.append(Layer(f"decode M={m}", found["one"], found["compute"], (4.0 * m * s.hidden,) * 2))
    return layers


def prefill(b: Bench, attention: Attention, mlp: Mlp, direct: Group | None, t: int) -> list[Layer]:
    """Tokens on both ranks between the layers (FP8 gathered, sums scattered), and all tokens everywhere."""
    w, s = b.world, b.s
    x, inner = tokens(t, s.hidden, b.device), tokens(t, s.heads * s.value, b.device, 1)
    mine = x.view(w.size, -1, s.hidden)[w.rank].contiguous()
    alone, half = mlp.tokens_everywhere(w.rank, w.size, SOLO), attention.spread(w, SOLO, tokens_split=True)
    part = inner[:, half.heads[0] * s.value : half.heads[1] * s.value].contiguous()
    latent, every = tokens(t, s.q_rank, b.device), tokens(t, s.kv_rank, b.device)
    calls: dict[str, Callable[[], Any]] = {
        "mlp one": lambda: mlp.whole(x),
        "attention one": lambda: attention.whole(x, inner),
        "mlp compute": lambda: alone(x),
        "attention compute": lambda: (
            half.latent["q_a"](mine),
            half.latent["kv_a"](mine),
            half.q_b(latent),
            half.kv_b(every),
            half.o(part),
        ),
        "norm + mlp one": lambda: mlp.normed(x),
    }
    for name, group in groups(b, direct).items():
        for c in (1, 2) if group is w.tp else (1,):
            layer = mlp.tokens_split(w.rank, w.size, group, c)
            calls[f"mlp split, {name}, {c} chunks"] = lambda layer=layer: layer(mine)
        rounded = mlp.tokens_split(w.rank, w.size, group, 2 if group is w.tp else 1, sums="bfloat16")
        calls[f"mlp split, {name}, bf16 sums"] = lambda layer=rounded: layer(mine)
        normed = mlp.tokens_split(w.rank, w.size, group, 2 if group is w.tp else 1, normed=True)
        calls[f"norm + mlp split, {name}"] = lambda layer=normed: layer(mine)
        everywhere = mlp.tokens_everywhere(w.rank, w.size, group)
        calls[f"mlp everywhere, {name}"] = lambda layer=everywhere: layer(x)
        split, whole = (attention.spread(w, group, tokens_split=split) for split in (True, False))
        calls[f"attention split, {name}"] = lambda layer=split: layer(mine, part)
        calls[f"attention everywhere, {name}"] = lambda layer=whole: layer(x, part)
    for name, call in calls.items():
        what, how, *_ = name.split(",")[0].split()
        if how in ("split", "everywhere") and "bf16" not in name:
            want = mlp.whole(x) if what == "mlp" else attention.whole(x, inner)
            rows = want.view(w.size, -1, s.hidden)[w.rank] if how == "split" else want
            b.agreed.append(parallel_checks.agree(w, f"{name}, {t} tokens", call(), rows, b.say))
    b.keep("agree", b.agreed)
    found = b.us({name: call for name, call in calls.items() if "backend" not in name}, repeat=2)
    b.say(f"prefill {t} parts us:", {k: round(v) for k, v in found.items()})
    found |= b.us({name: call for name, call in calls.items() if "backend" in name}, repeat=2)
    b.say("prefill parts us:", {k: round(v) for k, v in found.items() if "backend" in k})
    table: dict[str, object] = {"tokens": t, "parts_us": found}
    one = found["mlp one"] + found["attention one"]
    for name in groups(b, direct):
        for how in ("split", "everywhere"):
            parts = [
                min(us for call, us in found.items() if call.startswith(f"{what} {how}, {name}") and "bf16" not in call)
                for what in ("mlp", "attention")
            ]
            speedups = {
                "mlp": found["mlp one"] / parts[0],
                "attention": found["attention one"] / parts[1],
                "together": one / sum(parts),
            }
            table[f"{how}, {name}"] = speedups
            b.say(f"prefill {t} {how}, {name}: speedup", show(speedups))
    b.keep(f"prefill {t}", table)
    halved = (found["mlp one"] + found["attention one"], found["mlp compute"] + found["attention compute"])
    return [Layer(f"prefill T={t}", *halved, (4.0 * t * s.hidden,) * 2)]


def wire(b: Bench, mlp: Mlp) -> None:
    """Gathering tokens for gate and up: FP8 and scales against bf16, the multiplication left out and in."""
    w, s = b.world, b.s
    rows = {}
    first, _ = mlp.layers(w.rank, w.size, w.tp, split=True)
    plain, _ = mlp.layers(w.rank, w.size, w.tp, split=False)
    for t in (s.prefill[0] // 8, s.prefill[0]):
        mine = tokens(t // w.size, s.hidden, b.device)
        found = b.us(
            {
                "fp8 gather": lambda x=mine: first.start_gather(x).whole(),
                "bf16 gather": lambda x=mine: w.tp.all_gather(x),
                "fp8 gather + linear": lambda x=mine: first(x),
                "bf16 gather + linear": lambda x=mine: plain(w.tp.all_gather(x)),
            },
            repeat=4,
        )
        rows[t] = found
        b.say(f"wire T={t}:", show(found))
        b.keep("wire", rows)


def experts(b: Bench, direct: Group | None) -> None:
    """V3's 256 routed experts: whole on one device, and half of them on each of two."""
    w, s, rows = b.world, b.s, {}
    moe = Moe(s, b.device, NUMERICS)
    spread = {how: moe.spread(w.rank, w.size, w.tp, how) for how in ("dispatch", "reduce")}
    if direct is not None:
        spread["reduce, direct"] = moe.spread(w.rank, w.size, direct, "reduce")
    b.keep("experts conformance", parallel_checks.experts(w, moe, spread, b.say))
    for t in (*s.decode, s.prefill[0]):
        if b.left() < 4:
            b.say(f"experts T={t}: left out, no time")
            break
        rows[t] = _experts_at(b, t, moe, spread)
        b.say(f"experts T={t}:", show(rows[t]))
        b.keep("experts", rows)


def _experts_at(b: Bench, t: int, moe: Moe, spread: dict[str, ParallelExperts]) -> dict[str, float]:
    """dispatch exchanges counts, which no graph can hold: it is compared with one device launched eagerly too.

    "largest share": of the (token, expert) rows, those on the rank that has more of them; an even one is 0.5.
    """
    x = tokens(t, b.s.hidden, b.device)
    index, weights = moe.routing(t, b.device)

    def call(layer: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: layer(x, index, weights)

    captured = {name: call(layer) for name, layer in spread.items() if name != "dispatch"}
    found = b.us({"one": call(moe.whole)} | captured, rounds=10, repeat=2 if t > 1000 else 4)
    eager = {f"{name}, eager": call(spread[name]) for name in ("dispatch", "reduce")}
    found |= b.us({"one, eager": call(moe.whole)} | eager, graphs=False, rounds=8)
    owner = index.flatten() * b.world.size // b.s.experts
    found["largest share"] = float(owner.bincount().max()) / owner.numel()
    for name in captured:
        found[f"speedup {name}"] = found["one"] / found[name]
    for name in eager:
        found[f"speedup {name}"] = found["one, eager"] / found[name]
    return found
