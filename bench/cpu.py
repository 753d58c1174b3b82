"""CPU kernels beside what torch does without us, in one run on one machine: bench/results/cpu.{md,json}.

    python bench/cpu.py [--seconds 1] [--threads 1 2] [--shapes 4096x7168 …] [--m 1 4 16 64 128 1024] [--out DIR]

Competitors, all interleaved round by round, medians of the rounds (the JSON holds the best round too):

    fp32        F.linear on weights dequantized beforehand, 4 bytes each
    bf16        F.linear in bf16, what transformers does with an FP8 checkpoint on a CPU
    dequantize  the reference's dequantize and F.linear in fp32, each call
    exact       cpu.native, weight-only, x in fp32: the same result as "fp32" up to rounding
    w8a8        cpu.native, x in bf16 quantized 1x128: what the checkpoint asks for
    slices      cpu.slices, weight-only: the path without a compiler

One thread is timed by its own CPU time, which a busy machine disturbs less; more threads by the wall clock. A kernel
whose worst row is further than 1e-5 from fp64 is not timed. BLOCKSCALE_CPU_ISA=avx2 with ATEN_CPU_CAPABILITY=avx2 and
ONEDNN_MAX_CPU_ISA=AVX2 show an AVX2 machine's numbers, on both sides.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
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

BIG = ((4096, 7168), (7168, 2048), (24576, 1536), (12288, 4096), (4096, 4096))
SHAPES = (*BIG, (576, 1536), (192, 576))
ROWS = (1, 4, 16, 64, 128, 1024)
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


def linear_rows(n: int, k: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One result a (threads, M) for a weight [n, k] in 128x128 blocks."""
    w = reference.quantize(torch.randn(n, k) * 0.02, get_format("fp8_128x128"))
    fp32 = reference.dequantize(w)
    bf16 = fp32.bfloat16()
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for m in args.m:
            x = torch.randn(m, k)
            half = x.bfloat16()
            calls: Calls = {
                "fp32": lambda x=x: F.linear(x, fp32),
                "bf16": lambda half=half: F.linear(half, bf16),
                "exact": lambda x=x: blockscale.linear(x, w, numerics="weight_only", kernel="cpu.native"),
                "w8a8": lambda half=half: blockscale.linear(half, w, kernel="cpu.native"),
            }
            if (n, k) == BIG[0] and m in (1, 16, 128):
                calls["slices"] = lambda x=x: blockscale.linear(x, w, numerics="weight_only", kernel="cpu.slices")
                calls["dequantize"] = lambda x=x: F.linear(x, reference.dequantize(w))
            error = worst_row(calls["exact"](), x.double() @ fp32.double().T)
            if not error < 1e-5:
                raise SystemExit(f"cpu.native is wrong by {error:g} at {n}x{k}, M={m}: not timed")
            times = interleaved(calls, args.seconds, threads)
            results.append({"n": n, "k": k, "m": m, "threads": threads, "error": error, "seconds": times})
            ratios = {name: times["fp32"][0] / t[0] for name, t in times.items()}
            print(f"{n}x{k} M={m} threads={threads}", {a: f"{b:.2f}" for a, b in ratios.items()}, flush=True)
    return results


def bandwidth(args: argparse.Namespace) -> list[dict[str, Any]]:
    """GB/s of reading, copying and quantizing 64 MB and more."""
    x = torch.randn(4096, 7168)
    half, to, to_half = x.bfloat16(), torch.empty_like(x), torch.empty(4096, 7168, dtype=torch.bfloat16)
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        calls: Calls = {
            "read": x.sum,
            "copy fp32": lambda: to.copy_(x),
            "copy bf16": lambda: to_half.copy_(half),
            "quantize fp32": lambda: blockscale.quantize(x, "fp8_1x128", kernel="cpu.native"),
            "quantize bf16": lambda: blockscale.quantize(half, "fp8_1x128", kernel="cpu.native"),
            "quantize bf16 128x128": lambda: blockscale.quantize(half, "fp8_128x128", kernel="cpu.native"),
        }
        moved = dict(zip(calls, (4, 8, 4, 5, 3, 3), strict=True))
        times = interleaved(calls, args.seconds * 3, threads)
        gbps = {name: moved[name] * x.numel() / t[0] / 1e9 for name, t in times.items()}
        results.append({"threads": threads, "gigabytes_per_second": gbps})
        print(f"bandwidth threads={threads}", {a: f"{b:.1f}" for a, b in gbps.items()}, flush=True)
    return results


def overhead() -> dict[str, float]:
    """Microseconds of one call of a 192x576 layer, from Python, one thread."""
    torch.set_num_threads(1)
    x, w = torch.randn(1, 576), reference.quantize(torch.randn(192, 576), get_format("fp8_128x128"))
    dense, module = reference.dequantize(w), blockscale.nn.Linear(w, numerics="weight_only")
    half, dense_half, w8a8 = x.bfloat16(), dense.bfloat16(), blockscale.nn.Linear(w)
    problem = blockscale.ops.linear_problem(w, torch.float32, "weight_only")
    calls: Calls = {
        "F.linear fp32": lambda: F.linear(x, dense),
        "F.linear bf16": lambda: F.linear(half, dense_half),
        "nn.Linear weight-only fp32": lambda: module(x),
        "nn.Linear W8A8 bf16": lambda: w8a8(half),
        "kernel alone, weight-only fp32": lambda: native.linear(problem, x, w, None),
    }
    with torch.inference_mode():
        return {name: t[0] * 1e6 for name, t in interleaved(calls, 3, 1).items()}


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# CPU kernels",
        "",
        f"`{report['platform']}`, kernels for {report['isa']}, torch's own for {report['torch_isa']}. "
        "Ratios are time of fp32 F.linear / time (larger is faster), medians of interleaved rounds.",
        "See `bench/cpu.py` for what the names mean.",
        "",
    ]
    for row in report["bandwidth"]:
        gbps = ", ".join(f"{name} {value:.1f}" for name, value in row["gigabytes_per_second"].items())
        lines.append(f"- GB/s with {row['threads']} thread(s): {gbps}")
    micros = ", ".join(f"{name} {value:.1f}" for name, value in report["microseconds_192x576"].items())
    lines += [f"- microseconds a call, 192x576, M=1: {micros}", ""]
    lines += [
        "| N x K | M | threads | fp32 ms | bf16 | exact | w8a8 | slices | dequantize | exact: GB/s of weights |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["linear"]:
        t = {name: value[0] for name, value in row["seconds"].items()}
        ratios = [
            f"{t['fp32'] / t[c]:.2f}" if c in t else "" for c in ("bf16", "exact", "w8a8", "slices", "dequantize")
        ]
        speed = f"{row['n'] * row['k'] / t['exact'] / 1e9:.1f}"
        head = f"{row['n']}x{row['k']} | {row['m']} | {row['threads']} | {t['fp32'] * 1e3:.2f}"
        lines.append(f"| {head} | {' | '.join(ratios)} | {speed} |")
    lines += ["", "Geometric means over the five big shapes:", ""]
    lines += ["| M | threads | bf16 | exact | w8a8 | exact / bf16 |", "|---|---|---|---|---|---|"]
    for (m, threads), means in summary(report["linear"]).items():
        cells = [means["bf16"], means["exact"], means["w8a8"], means["exact"] / means["bf16"]]
        lines.append(f"| {m} | {threads} | {' | '.join(f'{c:.2f}' for c in cells)} |")
    return "\n".join([*lines, ""])


def summary(rows: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, float]]:
    """(M, threads) -> competitor -> geomean of its speed relative to fp32."""
    big = [row for row in rows if (row["n"], row["k"]) in BIG]
    return {
        key: {
            name: geomean(
                [r["seconds"]["fp32"][0] / r["seconds"][name][0] for r in big if (r["m"], r["threads"]) == key]
            )
            for name in ("bf16", "exact", "w8a8")
        }
        for key in sorted({(row["m"], row["threads"]) for row in big})
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for one table row")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--m", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="cpu", help="file name of the report")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "platform": str(detect("cpu")),
        "isa": native.isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "microseconds_192x576": overhead(),
        "bandwidth": bandwidth(args),
        "linear": [],
    }
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        report["linear"] += linear_rows(n, k, args)
        args.out.mkdir(parents=True, exist_ok=True)  # after every shape: a long run that is cut short leaves its part
        (args.out / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / f"{args.name}.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
