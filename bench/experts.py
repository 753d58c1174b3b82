"""What a decode step of many experts reads: time of one token against the bytes of the experts that it chose.

`python bench/experts.py [DEVICE] [--experts E] [--out FILE]`: gate and up of E experts (default 64), 2048 x 7168 each,
8 of them chosen at random anew for each step, so that no cache helps. Prints, for each format, the chosen bytes, the
time of a step (median) and the rate that follows, beside the rate of a plain copy and the time that reading every
expert at that rate would take: a step must be far below it. Refuses to time a kernel that gives anything else than the
chosen experts alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from blockscale import nn, quantize
from blockscale.tensor import BlockScaled

N, K, TOP_K, STEPS = 4096, 7168, 8, 20
CASES = (("fp8_128x128", "checkpoint"), ("mxfp4", "checkpoint"), ("mxfp4", "weight_only"), ("nvfp4", "weight_only"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default=str(torch.accelerator.current_accelerator() or "cpu"))
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rate = copy_rate(options.device)
    print(f"copy: {rate / 1e9:.0f} GB/s", flush=True)
    print(
        "| format | numerics | kernel | chosen MB | all MB | us | GB/s of chosen | us to read all |\n"
        + "|---" * 8
        + "|"
    )
    rows = []
    for fmt, numerics in CASES:
        rows.append(r := measure(fmt, numerics, options.experts, options.device))
        everything = r["all_bytes"] / rate * 1e6
        print(
            f"| {fmt} | {numerics} | {r['kernel']} | {r['chosen_bytes'] / 1e6:.0f} | {r['all_bytes'] / 1e6:.0f} | "
            f"{r['us']:.0f} | {r['chosen_bytes'] / r['us'] / 1e3:.0f} | {everything:.0f} |", flush=True,
        )  # fmt: skip
        if options.out:
            options.out.write_text(json.dumps({"copy_gb_per_s": rate / 1e9, "rows": rows}, indent=1) + "\n")


def stack(fmt: str, experts: int, device: str) -> BlockScaled:
    """E random experts, made one by one: the fp32 source of all would not fit."""
    one = [quantize(torch.randn(N, K, device=device), fmt) for _ in range(experts)]
    data, scale = (torch.stack([raw(getattr(w, part)) for w in one]) for part in ("data", "scale"))
    level = None if one[0].global_scale is None else torch.stack([w.global_scale for w in one])
    return BlockScaled(
        data.view(one[0].data.dtype), scale.view(one[0].scale.dtype), one[0].format, shape=(experts, N, K),
        global_scale=level,
    )  # fmt: skip


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8) if t.element_size() == 1 else t


@torch.inference_mode()
def measure(fmt: str, numerics: str, experts: int, device: str) -> dict[str, Any]:
    w = stack(fmt, experts, device)
    module = nn.StackedLinear(w, numerics=numerics).pack(torch.bfloat16)
    x = torch.randn(TOP_K, K, device=device, dtype=torch.bfloat16)
    draws = [torch.randperm(experts)[:TOP_K].sort().values for _ in range(STEPS)]
    everyone = torch.arange(experts)
    offsets = [torch.searchsorted(d, everyone, right=True).int().to(device) for d in draws]
    chosen = draws[0].tolist()
    alone = torch.cat([
        nn.Linear(w[e], numerics=numerics, kernel="reference")(x[i : i + 1]) for i, e in enumerate(chosen)
    ])  # fmt: skip
    error = (module(x, offsets[0]).float() - alone.float()).norm() / alone.float().norm()
    assert error < 2**-7, f"{fmt} {numerics}: a step is {error:.1e} away from its experts alone"
    times = [timed(module, x, o, device) for o in offsets]
    each = sum(t.nbytes for t in (w.data, w.scale)) / experts
    return {
        "format": fmt, "numerics": numerics, "kernel": module.plan().pick(TOP_K).name, "us": statistics.median(times),
        "chosen_bytes": each * TOP_K, "all_bytes": each * experts,
    }  # fmt: skip


def timed(module: nn.StackedLinear, x: torch.Tensor, offsets: torch.Tensor, device: str) -> float:
    """Microseconds of a call: on an accelerator of the device alone, so host work does not count."""
    if device == "cpu":
        begin = time.perf_counter()
        module(x, offsets)
        return (time.perf_counter() - begin) * 1e6
    api = torch.get_device_module(device)
    start, end = api.Event(enable_timing=True), api.Event(enable_timing=True)
    hold = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    api.synchronize()
    for _ in range(4):
        hold.zero_()  # the device is busy until the host has queued the call
    start.record()
    module(x, offsets)
    end.record()
    api.synchronize()
    return start.elapsed_time(end) * 1e3


def copy_rate(device: str) -> float:
    """Bytes read and written a second by a copy of 1 GB (128 MB on a CPU)."""
    a = torch.zeros(1 << (27 if device == "cpu" else 30), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    best = float("inf")
    for _ in range(5):
        wait(device)
        begin = time.perf_counter()
        b.copy_(a)
        wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * a.nbytes / best


def wait(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


if __name__ == "__main__":
    main()
