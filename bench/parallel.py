"""Tensor and expert parallelism on several GPUs of one host against one of them, in one run.

    torchrun --nproc-per-node 2 bench/parallel.py --out DIR [--budget 180]

Layers of DeepSeek-V3's shapes. First conformance: nothing is timed that is wrong. Times are CUDA graphs where the work
can be captured, medians over rounds that alternate between one device and several; of several ranks the slowest
counts. `--device cpu --tiny` runs the same code on Gloo, to try it without GPUs. Writes parallel.json as it goes.
`parallel_warm.py` before it saves a minute of compiling.
"""

from __future__ import annotations

import argparse
import pathlib

import torch

import parallel_checks
from blockscale.parallel import joined
from parallel_clock import Bench, show
from parallel_direct import join, parts
from parallel_fit import Direct, Layer, Link, fit_link
from parallel_layers import DEEPSEEK, NUMERICS, TINY, Attention, Mlp
from parallel_runs import decode, experts, prefill, wire

PARTS = ("conformance", "decode", "prefill", "wire", "experts", "direct")
BETWEEN = Link(10.0, 50e3)
"""Assumed of a network between hosts: 10 us a step, 50 GB/s for each GPU."""


def collectives(b: Bench) -> Link:
    """All-reduce of fp32 over sizes; the fit that projections use."""
    sizes = [1 << p for p in (12, 15, 18, 21, 24, 27)] if b.gpu else [1 << 12, 1 << 16, 1 << 18]
    calls = {}
    for size in sizes:
        x = torch.zeros(size // 4, device=b.device)
        calls[str(size)] = lambda x=x: b.world.tp.all_reduce(x)
    sums = torch.zeros(b.s.prefill[0], b.s.hidden, device=b.device)
    rows = torch.zeros(b.s.prefill[0] // b.world.size, b.s.hidden, device=b.device, dtype=torch.uint8)
    layer = {
        "reduce-scatter of a layer's fp32 sums": lambda: b.world.tp.reduce_scatter(sums),
        "all-gather of its fp8 rows": lambda: b.world.tp.all_gather(rows),
    }
    found = b.us(layer, repeat=4)
    b.keep("layer_us", found)
    b.say("us:", show(found))
    found = b.us(calls, repeat=10)
    link = fit_link([(float(size), us) for size, us in found.items()], b.world.size)
    b.keep("all_reduce_us", found)
    b.keep("link", {"latency_us": link.latency_us, "gb_s": link.bytes_per_us / 1e3})
    b.say("all-reduce us:", {k: round(v, 1) for k, v in found.items()})
    b.say(f"fit: {link.latency_us:.1f} us a step, {link.bytes_per_us / 1e3:.0f} GB/s a direction")
    return link


def project(b: Bench, layers: list[Layer], link: Link, direct: Direct | None) -> None:
    """What the fitted model says about more ranks; without shared memory, the backend's link within one host."""
    rows = {}
    for layer in layers:
        for ranks in (2, 8, 16, 64):
            between = BETWEEN if ranks > 8 else link
            compute, traffic, speedup = layer.project(ranks, direct, between)
            name = f"{layer.name}, {ranks} ranks"
            rows[name] = {"compute": compute, "traffic": traffic, "speedup": speedup}
            b.say(f"projection {name}:", show(rows[name]))
    b.keep("projection", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--budget", type=float, default=180)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    options = parser.parse_args()
    wanted = options.only.split(",")
    with joined(options.device, timeout=45, sums="backend") as world, torch.inference_mode():
        b = Bench(world, TINY if options.tiny else DEEPSEEK, options.out, options.budget)
        name = torch.cuda.get_device_name() if b.gpu else "cpu"
        b.keep("machine", {"device": name, "ranks": world.size, "torch": torch.__version__})
        b.say(name, "x", world.size, torch.__version__)
        direct = join(b) if "direct" in wanted else None
        measured_direct = None if direct is None else parts(b, direct)
        link = collectives(b)
        if "conformance" in wanted:
            b.keep("conformance", parallel_checks.layers(world, b.say))
        attention, mlp = Attention(b.s, b.device, NUMERICS), Mlp(b.s, b.device, NUMERICS)
        measured = []
        for t in b.s.prefill if "prefill" in wanted else ():
            measured += prefill(b, attention, mlp, direct, t)
        measured += decode(b, attention, mlp, direct) if "decode" in wanted else []
        project(b, measured, link, measured_direct)
        if "wire" in wanted and b.left() > 5:
            wire(b, mlp)
        if "experts" in wanted and b.left() > 7:
            experts(b, direct)
        b.say("done")


if __name__ == "__main__":
    main()
