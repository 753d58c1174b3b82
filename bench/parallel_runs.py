"""What bench/parallel.py times: decode, prefill, the wire and experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import parallel_checks
from blockscale.errors import BlockscaleError
from blockscale.parallel import Group, ParallelExperts
from blockscale.parallel.direct import DirectGroup
from parallel_clock import Bench, show
from parallel_fit import Layer
from parallel_layers import NUMERICS, Attention, Everywhere, Mlp, Moe, tokens

SOLO = Group()


def direct(b: Bench) -> Group | None:
    """Sums through each other's memory, and what they cost; None where that is not to be had."""
    if not b.gpu or b.world.size != 2:
        return None
    try:
        group = DirectGroup(dist.group.WORLD, b.device)
    except BlockscaleError as e:
        b.say("no direct sums:", e)
        return None
    x = torch.randn(
        64,
        b.s.hidden,
        device=b.device,
        generator=torch.Generator(b.device).manual_seed(b.world.rank),
    )
    want = b.world.tp.all_reduce(x)
    got = group.wait(group.start_sum_in_place(x.clone()))
    if not torch.equal(got, want):
        raise RuntimeError("direct sums differ from NCCL's")
    found = b.us(
        {f"{m} tokens": lambda x=x[:m]: group.wait(group.start_sum_in_place(x)) for m in b.s.decode},
        repeat=10,
    )
    b.say("direct sums us:", show(found))
    b.keep("direct_us", found)
    return group


def decode(b: Bench, attention: Attention, mlp: Mlp, through: Group | None) -> list[Layer]:
    """All ranks hold all tokens; two all-reduces a layer, eight layers in one CUDA graph."""
    w, s, rows, layers = b.world, b.s, {}, []
    nearby = None
    if through is not None:
        nearby = (
            attention.spread(w, through, tokens_split=False),
            mlp.tokens_everywhere(w.rank, w.size, through),
        )
    spread = [attention.spread(w, group, tokens_split=False) for group in (w.tp, SOLO)]
    both = [mlp.tokens_everywhere(w.rank, w.size, group) for group in (w.tp, SOLO)]
    width = (spread[0].heads[1] - spread[0].heads[0]) * s.value

    def calls_for(m: int) -> dict[str, Callable[[], object]]:
        x, inner = (
            tokens(m, s.hidden, b.device),
            tokens(m, s.heads * s.value, b.device, 1),
        )
        part, sums = (
            inner[:, :width].contiguous(),
            torch.zeros(m, s.hidden, device=b.device),
        )
        calls: dict[str, Callable[[], object]] = {
            "one": lambda: (attention.whole(x, inner), mlp.whole(x)),
            "spread": lambda: (spread[0](x, part), both[0](x)),
            "compute": lambda: (spread[1](x, part), both[1](x)),
            "traffic": lambda: (w.tp.all_reduce(sums), w.tp.all_reduce(sums)),
        }
        if nearby is not None:
            calls["spread, direct sums"] = lambda: (nearby[0](x, part), nearby[1](x))
        return calls

    for m in s.decode:
        found = b.us(calls_for(m), rounds=15, repeat=8)
        rows[m] = found | {"speedup": found["one"] / found["spread"]}
        if nearby is not None:
            rows[m]["speedup, direct sums"] = found["one"] / found["spread, direct sums"]
        layers.append(
            Layer(
                f"decode M={m}",
                found["one"],
                found["compute"],
                ((4.0 * m * s.hidden, 2),) * 2,
            )
        )
        b.say(f"decode M={m}:", show(rows[m]))
        b.keep("decode" if nearby is None else "decode, direct sums", rows)
    return layers


def prefill(b: Bench, attention: Attention, mlp: Mlp) -> list[Layer]:
    """Each rank holds its tokens between the layers: FP8 gathered, fp32 sums scattered."""
    w, s, t = b.world, b.s, b.s.prefill
    x, inner = tokens(t, s.hidden, b.device), tokens(t, s.heads * s.value, b.device, 1)
    mine = x.view(w.size, -1, s.hidden)[w.rank].contiguous()
    spread = [attention.spread(w, group, tokens_split=True) for group in (w.tp, SOLO)]
    in_chunks = attention.spread(w, w.tp, tokens_split=True, chunks=4)
    part = inner[:, : (spread[0].heads[1] - spread[0].heads[0]) * s.value].contiguous()
    split = {c: mlp.tokens_split(w.rank, w.size, w.tp, c) for c in (1, 2, 4)}
    everywhere = {c: mlp.tokens_everywhere(w.rank, w.size, w.tp, c) for c in (1, 4)}
    alone = mlp.tokens_everywhere(w.rank, w.size, SOLO)
    half, first = spread[1], split[1].gate_up
    latent, every = tokens(t, s.q_rank, b.device), tokens(t, s.kv_rank, b.device)
    calls: dict[str, Callable[[], object]] = {
        "mlp one": lambda: mlp.whole(x),
        "attention one": lambda: attention.whole(x, inner),
        "mlp compute": lambda: alone(x),
        "attention spread, 1 chunks": lambda: spread[0](mine, part),
        "attention spread, 4 chunks": lambda: in_chunks(mine, part),
        "attention compute": lambda: (
            half.latent["q_a"](mine),
            half.latent["kv_a"](mine),
            half.q_b(latent),
            half.kv_b(every),
            half.o(part),
        ),
    }
    calls |= {f"mlp tokens split, {c} chunks": lambda c=c: split[c](mine) for c in split}
    calls |= {f"mlp all-reduce, {c} chunks": lambda c=c: everywhere[c](x) for c in everywhere}
    calls["bf16 sums instead"] = lambda: alone_in_bf16(alone, w.tp, x)
    calls["traffic, 1 chunks"] = lambda: (
        [w.tp.wait(p) for p in first.start_gather(mine)],
        w.tp.reduce_scatter(torch.empty(t, s.hidden, device=b.device)),
    )
    found = b.us(calls, repeat=2)
    best = min((n for n in found if n.startswith("mlp tokens")), key=found.__getitem__)
    attended = min((n for n in found if n.startswith("attention spread")), key=found.__getitem__)
    total = {
        "one": found["mlp one"] + found["attention one"],
        "spread": found[best] + found[attended],
        "best": f"{best}; {attended}",
        "mlp_speedup": found["mlp one"] / found[best],
        "attention_speedup": found["attention one"] / found[attended],
    }
    total["speedup"] = total["one"] / total["spread"]
    b.say("prefill parts us:", {k: round(v) for k, v in found.items()})
    b.say("prefill:", show(total))
    b.keep("prefill", {"tokens": t, "parts_us": found, **total})
    traffic = ((t * s.hidden * (1 + 4 / 128), 1), (4.0 * t * s.hidden, 1))
    return [Layer(f"prefill MLP T={t}", found["mlp one"], found["mlp compute"], traffic)]


def alone_in_bf16(half: Everywhere, group: Group, x: Tensor) -> Tensor:
    """What rounding partial sums to bf16 before they are added would give: other numerics, half the traffic."""
    return group.wait(group.start_reduce_scatter(half(x)))


def wire(b: Bench, mlp: Mlp) -> None:
    """Gathering tokens for gate and up: FP8 and scales against bf16, the multiplication left out and in."""
    w, s = b.world, b.s
    rows = {}
    first, _ = mlp.layers(w.rank, w.size, w.tp, split=True)
    plain, _ = mlp.layers(w.rank, w.size, w.tp, split=False)
    for t in (s.prefill // 8, s.prefill):
        mine = tokens(t // w.size, s.hidden, b.device)

        def quantized(x: Tensor = mine) -> object:
            return [w.tp.wait(part) for part in first.start_gather(x)]

        found = b.us(
            {
                "fp8 gather": quantized,
                "bf16 gather": lambda x=mine: w.tp.all_gather(x),
                "fp8 gather + linear": lambda x=mine: first(x),
                "bf16 gather + linear": lambda x=mine: plain(w.tp.all_gather(x)),
            },
            repeat=4,
        )
        rows[t] = found
        b.say(f"wire T={t}:", show(found))
        b.keep("wire", rows)


def experts(b: Bench) -> None:
    """V3's 256 routed experts: whole on one device, and half of them on each of two."""
    w, s, rows = b.world, b.s, {}
    moe = Moe(s, b.device, NUMERICS)
    spread = {how: moe.spread(w.rank, w.size, w.tp, how) for how in ("dispatch", "reduce")}
    b.keep("experts conformance", parallel_checks.experts(w, moe, spread, b.say))
    for t in (*s.decode, s.prefill):
        if b.left() < 15:
            b.say(f"experts T={t}: left out, no time")
            break
        rows[t] = _experts_at(b, t, moe, spread)
        b.say(f"experts T={t}:", show(rows[t]))
        b.keep("experts", rows)


def _experts_at(b: Bench, t: int, moe: Moe, spread: dict[str, ParallelExperts]) -> dict[str, float]:
    """dispatch exchanges counts, which no graph can hold: it is compared with one device launched eagerly too."""
    x = tokens(t, b.s.hidden, b.device)
    index, weights = moe.routing(t, b.device)
    captured = {
        "one": lambda: moe.whole(x, index, weights),
        "reduce": lambda: spread["reduce"](x, index, weights),
    }
    eager = {
        "one eager": lambda: moe.whole(x, index, weights),
        "dispatch": lambda: spread["dispatch"](x, index, weights),
    }
    found = b.us(captured, rounds=8, repeat=2) | b.us(eager, graphs=False, rounds=5)
    found |= b.us({"traffic of reduce": lambda: b.world.tp.all_reduce(x.float())}, repeat=4)
    return found | {
        "speedup reduce": found["one"] / found["reduce"],
        "speedup dispatch": found["one eager"] / found["dispatch"],
    }
