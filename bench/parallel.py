"""Tensor and expert parallelism on several GPUs of one host against one of them, in one run.

    torchrun --nproc-per-node 2 bench/parallel.py --out DIR [--budget 180]

Layers of DeepSeek-V3's shapes. First conformance: nothing is timed that is wrong. Times are CUDA graphs where the work
can be captured, medians over rounds that alternate between one device and several; of several ranks the slowest
counts. `--device cpu --tiny` runs the same code on Gloo, to try it without GPUs. Writes parallel.json as it goes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import parallel_checks
from blockscale.errors import BlockscaleError
from blockscale.parallel import Group, World, joined
from blockscale.parallel.direct import DirectGroup
from parallel_fit import Layer, Link, fit_link
from parallel_layers import DEEPSEEK, TINY, Attention, Everywhere, Mlp, Moe, Sizes, tokens

NUMERICS = "deepseek_v3"
SOLO = Group()


class Bench:
    """One run: sizes, clocks, and the results so far."""

    def __init__(self, world: World, sizes: Sizes, out: pathlib.Path | None, budget: float) -> None:
        self.world, self.s, self.out, self.budget = world, sizes, out, budget
        self.device, self.start = world.device, time.monotonic()
        self.gpu = self.device.type != "cpu"
        self.rows: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds, the same on every rank: rank 0's."""
        t = torch.tensor([self.budget - (time.monotonic() - self.start)], device=self.device)
        return float(self.world.tp.all_gather(t)[0])

    def say(self, *words: object) -> None:
        if self.world.speaks:
            print(f"[{time.monotonic() - self.start:6.1f}s]", *words, flush=True)

    def keep(self, key: str, value: Any) -> None:
        """Write what is known so far: a run that is cut short loses nothing."""
        self.rows[key] = value
        if self.world.speaks and self.out is not None:
            (self.out / "parallel.json").write_text(json.dumps(self.rows, indent=1))

    def us(
        self, calls: dict[str, Callable[[], object]], *, graphs: bool = True, rounds: int = 12, repeat: int = 1
    ) -> dict[str, float]:
        """Median microseconds of each call over alternating rounds; every rank makes all of them, the slowest counts.

        repeat: calls in one graph, as a model has many layers: ranks do not start a graph in the same microsecond.
        """
        repeat = repeat if self.gpu and graphs else 1
        ready = {name: self._ready(call, graphs, repeat) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds if self.gpu else 2):
            for name, call in ready.items():
                self.world.tp.all_reduce(torch.zeros(1, device=self.device))
                times[name].append(self._once(call) / repeat)
        mine = torch.tensor([statistics.median(times[name]) for name in calls], device=self.device)
        slowest = self.world.tp.all_reduce(mine, "max").tolist()
        return dict(zip(calls, slowest, strict=True))

    def _ready(self, call: Callable[[], object], graphs: bool, repeat: int) -> Callable[[], object]:
        for _ in range(2):
            call()
        if not (self.gpu and graphs):
            return call
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, capture_error_mode="thread_local"):  # NCCL's watchdog asks for events
                for _ in range(repeat):
                    call()
        except RuntimeError as e:
            self.say("NOT captured, timed eagerly:", str(e).splitlines()[0])
            torch.cuda.synchronize()
            return call
        captured.replay()
        return captured.replay

    def _once(self, call: Callable[[], object]) -> float:
        if not self.gpu:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e6
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def collectives(b: Bench) -> Link:
    """All-reduce of fp32 over sizes; the fit that projections use."""
    sizes = [1 << p for p in (12, 15, 18, 21, 24, 27)] if b.gpu else [1 << 12, 1 << 16, 1 << 18]
    calls = {}
    for size in sizes:
        x = torch.zeros(size // 4, device=b.device)
        calls[str(size)] = lambda x=x: b.world.tp.all_reduce(x)
    found = b.us(calls, repeat=10)
    link = fit_link([(float(size), us) for size, us in found.items()], b.world.size, 2)
    b.keep("all_reduce_us", found)
    b.keep("link", {"latency_us": link.latency_us, "gb_s": link.bytes_per_us / 1e3})
    b.say("all-reduce us:", {k: round(v, 1) for k, v in found.items()})
    b.say(f"fit: {link.latency_us:.1f} us a step, {link.bytes_per_us / 1e3:.0f} GB/s a direction")
    return link


def direct(b: Bench) -> Group | None:
    """Sums through each other's memory, and what they cost; None where that is not to be had."""
    if not b.gpu or b.world.size != 2:
        return None
    try:
        group = DirectGroup(dist.group.WORLD, b.device)
    except BlockscaleError as e:
        b.say("no direct sums:", e)
        return None
    x = torch.randn(64, b.s.hidden, device=b.device, generator=torch.Generator(b.device).manual_seed(b.world.rank))
    want = b.world.tp.all_reduce(x)
    got = group.wait(group.start_sum_in_place(x.clone()))
    if not torch.equal(got, want):
        raise RuntimeError("direct sums differ from NCCL's")
    found = b.us(
        {f"{m} tokens": lambda x=x[:m]: group.wait(group.start_sum_in_place(x)) for m in b.s.decode}, repeat=10
    )
    b.say("direct sums us:", _show(found))
    b.keep("direct_us", found)
    return group


def decode(b: Bench, attention: Attention, mlp: Mlp, through: Group | None) -> list[Layer]:
    """All ranks hold all tokens; two all-reduces a layer, eight layers in one CUDA graph."""
    w, s, rows, layers = b.world, b.s, {}, []
    nearby = None
    if through is not None:
        nearby = attention.spread(w, through, tokens_split=False), mlp.tokens_everywhere(w.rank, w.size, through)
    spread = [attention.spread(w, group, tokens_split=False) for group in (w.tp, SOLO)]
    both = [mlp.tokens_everywhere(w.rank, w.size, group) for group in (w.tp, SOLO)]
    width = (spread[0].heads[1] - spread[0].heads[0]) * s.value
    for m in s.decode:
        x, inner = tokens(m, s.hidden, b.device), tokens(m, s.heads * s.value, b.device, 1)
        part = inner[:, :width].contiguous()
        sums = torch.zeros(m, s.hidden, device=b.device)
        calls: dict[str, Callable[[], object]] = {
            "one": lambda: (attention.whole(x, inner), mlp.whole(x)),
            "spread": lambda: (spread[0](x, part), both[0](x)),
            "compute": lambda: (spread[1](x, part), both[1](x)),
            "traffic": lambda: (w.tp.all_reduce(sums), w.tp.all_reduce(sums)),
        }
        if nearby is not None:
            calls["spread, direct sums"] = lambda: (nearby[0](x, part), nearby[1](x))
        found = b.us(calls, rounds=15, repeat=8)
        rows[m] = found | {"speedup": found["one"] / found["spread"]}
        if nearby is not None:
            rows[m]["speedup, direct sums"] = found["one"] / found["spread, direct sums"]
        layers.append(Layer(f"decode M={m}", found["one"], found["compute"], ((4.0 * m * s.hidden, 2),) * 2))
        b.say(f"decode M={m}:", _show(rows[m]))
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
        ),  # fmt: skip
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
    b.say("prefill:", _show(total))
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
        b.say(f"wire T={t}:", _show(found))
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
        x = tokens(t, s.hidden, b.device)
        index, weights = moe.routing(t, b.device)
        found = b.us(
            {
                "one": lambda: moe.whole(x, index, weights),
                "reduce": lambda: spread["reduce"](x, index, weights),
            },
            rounds=8,
            repeat=2,
        )
        found |= b.us({"one eager": lambda: moe.whole(x, index, weights)}, graphs=False, rounds=5)
        found |= b.us({"dispatch": lambda: spread["dispatch"](x, index, weights)}, graphs=False, rounds=5)
        found["traffic of reduce"] = b.us({"t": lambda x=x: w.tp.all_reduce(x.float())}, repeat=4)["t"]
        rows[t] = found | {
            "speedup reduce": found["one"] / found["reduce"],
            "speedup dispatch": found["one eager"] / found["dispatch"],
        }
        b.say(f"experts T={t}:", _show(rows[t]))
        b.keep("experts", rows)


def project(b: Bench, layers: list[Layer], link: Link) -> None:
    """What the fitted model says about more ranks. Beyond one host: 50 GB/s and 10 us a step are assumed."""
    between, rows = Link(10.0, 50e3), {}
    for layer in layers:
        for ranks in (2, 8, 16, 64):
            compute, traffic, speedup = layer.project(ranks, link, between)
            rows[f"{layer.name}, {ranks} ranks"] = {"compute": compute, "traffic": traffic, "speedup": speedup}
            b.say(f"projection {layer.name}, {ranks} ranks:", _show(rows[f"{layer.name}, {ranks} ranks"]))
    b.keep("projection", rows)


def _show(row: dict[str, Any]) -> str:
    def word(v: Any) -> str:
        return str(v) if not isinstance(v, float) else f"{v:.2f}" if v < 100 else f"{v:.0f}"

    return ", ".join(f"{k} {word(v)}" for k, v in row.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--budget", type=float, default=180)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with joined(options.device, timeout=45) as world, torch.inference_mode():
        b = Bench(world, TINY if options.tiny else DEEPSEEK, options.out, options.budget)
        name = torch.cuda.get_device_name() if b.gpu else "cpu"
        b.keep("machine", {"device": name, "ranks": world.size, "torch": torch.__version__})
        b.say(name, "x", world.size, torch.__version__)
        b.keep("conformance", parallel_checks.layers(world, b.say))
        link = collectives(b)
        attention, mlp = Attention(b.s, b.device, NUMERICS), Mlp(b.s, b.device, NUMERICS)
        measured = decode(b, attention, mlp, None)
        measured += prefill(b, attention, mlp)
        project(b, measured, link)
        if b.left() > 20:
            wire(b, mlp)
        if b.left() > 30:
            experts(b)
        through = direct(b) if b.left() > 15 else None
        if through is not None:
            decode(b, attention, mlp, through)
        b.say("done")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    main()
