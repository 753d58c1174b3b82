"""CPU kernels beside what torch does without us, in one table: bench/results/cpu.{md,json}.

    python bench/cpu.py [--isa best avx2] [--threads 1 2] [--shapes 4096x7168 …] [--m 1 4 16 …] [--seconds 1] [--fresh]

Each (instruction set, threads, shape) is a part. Parts that are measured replace those of the same name in the JSON and
leave the others, so a long run may be cut into short ones: `--threads 1`, then `--threads 2`, then `--isa avx2`.

Competitors, all interleaved round by round, medians of the rounds (the JSON holds the best round too):

    fp32        F.linear on weights dequantized beforehand, 4 bytes each
    bf16        F.linear in bf16, what transformers does with an FP8 checkpoint on a CPU
    dequantize  the reference's dequantize and F.linear in fp32, each call; one shape only, since it takes seconds
    exact       cpu.native, weight-only, x in fp32: the same result as "fp32" up to rounding
    w8a8        cpu.native, x in bf16 quantized 1x128: what the checkpoint asks for
    int16       cpu.int16, weight-only, x in fp32, M >= 8: 16-bit fixed point, by the user's leave
    slices      cpu.slices, weight-only: the path without a compiler; one shape only
    read        M <= 4: the sum of the fp32 weights, which is as fast as this machine reads at that moment

One thread is timed by its own CPU time, which a busy machine disturbs less; more threads by the wall clock. A kernel
whose worst row is further than 1e-5 (int16: 1e-3) from fp64 is not timed. `--isa avx2` starts a process in which
BLOCKSCALE_CPU_ISA, ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS say so to everybody.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import blockscale
from blockscale import reference
from blockscale.formats import get_format
from blockscale.kernels.cpu import native
from blockscale.platform import detect
from cpu_table import markdown

BIG = ((4096, 7168), (7168, 2048), (24576, 1536), (12288, 4096), (4096, 4096))
SHAPES = (*BIG, (576, 1536), (192, 576))
ROWS = (1, 4, 16, 64, 128, 1024)
FORCED = {"avx2": {"BLOCKSCALE_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
                   "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}  # fmt: skip
Calls = dict[str, Callable[[], Any]]


def interleaved(calls: Calls, seconds: float, threads: int) -> dict[str, tuple[float, float]]:
    """name -> (median, best) seconds a call. Rounds go on until the time is spent, three at least."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeat = {}
    for name, call in calls.items():  # warm up, and repeat what is too short for the clock
        call()
        start = time.perf_counter()
        call()
        repeat[name] = max(1, int(2e-3 / (time.perf_counter() - start)))
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            start = clock()
            for _ in range(repeat[name]):
                call()
            times[name].append((clock() - start) / repeat[name])
        rounds += 1
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


def worst_row(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).norm(dim=1) / want.norm(dim=1)).max().item()


def linear_rows(n: int, k: int, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One result an M for a weight [n, k] in 128x128 blocks."""
    w = reference.quantize(torch.randn(n, k) * 0.02, get_format("fp8_128x128"))
    fp32 = reference.dequantize(w)
    bf16 = fp32.bfloat16()
    results = []
    for m in args.m:
        x = torch.randn(m, k)
        half = x.bfloat16()
        # in this order, so that no call finds the same weights in the cache
        calls: Calls = {
            "fp32": lambda x=x: F.linear(x, fp32),
            "exact": lambda x=x: blockscale.linear(x, w, numerics="weight_only", kernel="cpu.native"),
            "bf16": lambda half=half: F.linear(half, bf16),
            "read": fp32.sum,
            "w8a8": lambda half=half: blockscale.linear(half, w, kernel="cpu.native"),
        }
        if m > 4:
            del calls["read"]
        if m >= 8:
            calls["int16"] = lambda x=x: blockscale.linear(x, w, numerics="weight_only,int16=True")
        if (n, k) == BIG[0] and m in (1, 16, 128):
            calls["slices"] = lambda x=x: blockscale.linear(x, w, numerics="weight_only", kernel="cpu.slices")
            calls["dequantize"] = lambda x=x: F.linear(x, reference.dequantize(w))
        errors = {}
        some = slice(0, 16)  # rows of x that are checked: fp64 is slow
        for name, most in {"exact": 1e-5, "int16": 1e-3}.items():
            if name in calls:
                errors[name] = worst_row(calls[name]()[some], x[some].double() @ fp32.double().T)
                if not errors[name] < most:
                    raise SystemExit(f"{name} is wrong by {errors[name]:g} at {n}x{k}, M={m}: not timed")
        times = interleaved(calls, args.seconds, threads)
        results.append({"n": n, "k": k, "m": m, "errors": errors, "seconds": times})
        ratios = {name: times["fp32"][0] / t[0] for name, t in times.items()}
        print(f"{n}x{k} M={m} threads={threads}", {a: f"{b:.2f}" for a, b in ratios.items()}, flush=True)
    return results


def bandwidth(threads: int, seconds: float) -> dict[str, float]:
    """GB/s of reading, copying and quantizing 64 MB and more.

    A result of that size comes from the system page by page, which costs more than the copy: so "clone" stands beside
    `quantize`, and "copy" beside the quantizer that writes to memory in use.
    """
    x = torch.randn(4096, 7168)
    half, to, to_half = x.bfloat16(), torch.empty_like(x), torch.empty(4096, 7168, dtype=torch.bfloat16)
    calls: Calls = {
        "read": x.sum,
        "copy fp32": lambda: to.copy_(x),
        "copy bf16": lambda: to_half.copy_(half),
        "quantizer fp32": quantizer(x, "fp8_1x128"),
        "quantizer bf16": quantizer(half, "fp8_1x128"),
        "quantizer bf16 128x128": quantizer(half, "fp8_128x128"),
        "clone fp32": x.clone,
        "clone bf16": half.clone,
        "quantize fp32": lambda: blockscale.quantize(x, "fp8_1x128", kernel="cpu.native"),
        "quantize bf16": lambda: blockscale.quantize(half, "fp8_1x128", kernel="cpu.native"),
        "quantize bf16 128x128": lambda: blockscale.quantize(half, "fp8_128x128", kernel="cpu.native"),
    }
    moved = dict(zip(calls, (4, 8, 4, 5, 3, 3, 8, 4, 5, 3, 3), strict=True))
    times = interleaved(calls, seconds * 5, threads)
    gbps = {name: moved[name] * x.numel() / t[0] / 1e9 for name, t in times.items()}
    print(f"bandwidth threads={threads}", {a: f"{b:.1f}" for a, b in gbps.items()}, flush=True)
    return gbps


def quantizer(x: torch.Tensor, name: str) -> Callable[[], Any]:
    """The native quantizer alone, over and over into the same result."""
    made, fmt = blockscale.quantize(x, name), get_format(name)
    rule = native._rule(fmt, None, 1e-10)
    arguments = (
        *x.shape, x.data_ptr(), native.TYPES[x.dtype], None,
        made.data.data_ptr(), made.scale.data_ptr(), native.TYPES[made.scale.dtype],
    )  # fmt: skip
    held = x, made  # what the addresses point to
    return lambda: (native.library().blockscale_quantize(native.byref(rule), *arguments), held)


def overhead(threads: int) -> dict[str, float]:
    """Microseconds of one call of a 192x576 layer, M=1, from Python to the kernel and back."""
    x, w = torch.randn(1, 576), reference.quantize(torch.randn(192, 576), get_format("fp8_128x128"))
    dense, module, w8a8 = (
        reference.dequantize(w),
        blockscale.nn.Linear(w, numerics="weight_only"),
        blockscale.nn.Linear(w),
    )
    half, dense_half = x.bfloat16(), dense.bfloat16()
    stock = {dtype: torch.nn.Linear(576, 192, bias=False, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    problem = blockscale.ops.linear_problem(w, torch.float32, "weight_only")
    half_problem = blockscale.ops.linear_problem(w, torch.bfloat16)
    buffers = (w.data, w.scale, None, None, None, 192, 576, "fp8_128x128", "row", "weight_only", "")
    calls: Calls = {
        "F.linear fp32": lambda: F.linear(x, dense),
        "torch.nn.Linear fp32": lambda: stock[torch.float32](x),
        "nn.Linear weight-only fp32": lambda: module(x),
        "the torch.library op": lambda: torch.ops.blockscale.linear(x, *buffers),
        "its kernel, without dispatch": lambda: native.linear(problem, x, w, None),
        "F.linear bf16": lambda: F.linear(half, dense_half),
        "torch.nn.Linear bf16": lambda: stock[torch.bfloat16](half),
        "nn.Linear W8A8 bf16": lambda: w8a8(half),
        "its kernel": lambda: native.linear(half_problem, half, w, None),
    }
    with torch.inference_mode():
        return {name: t[0] * 1e6 for name, t in interleaved(calls, 3, threads).items()}


def measure(args: argparse.Namespace, target: Path) -> None:
    """The parts of one process's instruction set, merged into the report after each: a run cut short leaves them."""
    isa = native.isa()
    for threads in args.threads:
        torch.set_num_threads(threads)
        head = {
            "isa": isa,
            "threads": threads,
            "platform": str(detect("cpu")),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "load": round(os.getloadavg()[0], 1),
            "measured": time.strftime("%Y-%m-%d %H:%M"),
            "gigabytes_per_second": bandwidth(threads, args.seconds),
            "microseconds_192x576": overhead(threads),
        }
        save(target, "machine", [head], ("isa", "threads"))
        for shape in args.shapes:
            n, k = map(int, shape.split("x"))
            rows = [{"isa": isa, "threads": threads, **row} for row in linear_rows(n, k, threads, args)]
            save(target, "linear", rows, ("isa", "threads", "n", "k", "m"))


def save(target: Path, table: str, rows: list[dict[str, Any]], key: tuple[str, ...]) -> None:
    """Put rows in the place of those with the same key, and write both files."""
    report: dict[str, list[dict[str, Any]]] = {"machine": [], "linear": []}
    if target.exists():
        report = json.loads(target.read_text())
    new = {tuple(row[name] for name in key) for row in rows}
    report[table] = [row for row in report[table] if tuple(row[name] for name in key) not in new] + rows
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    target.with_suffix(".md").write_text(markdown(report, BIG))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", default=["best", *FORCED], choices=["best", *FORCED])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for one table row")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--m", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="cpu", help="file name of the report")
    parser.add_argument("--fresh", action="store_true", help="forget earlier parts")
    args = parser.parse_args()
    target = args.out / f"{args.name}.json"
    if args.fresh:
        target.unlink(missing_ok=True)
    for isa in args.isa:
        forced = FORCED.get(isa, {})
        if all(os.environ.get(name) == value for name, value in forced.items()):
            measure(args, target)
            continue
        rest = [a for a in sys.argv[1:] if a not in (*FORCED, "best", "--isa", "--fresh")]
        subprocess.run([sys.executable, __file__, *rest, "--isa", isa], env={**os.environ, **forced}, check=True)


if __name__ == "__main__":
    main()
