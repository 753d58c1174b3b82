"""Portable Triton kernels on a CUDA device: right first, then timed beside their peers in one run.

    python bench/triton_bench.py --out DIR [--quick] [--section NAME]…

1. Correctness (`triton_checks.py`): native casts against the codec and the reference, CUDA graphs, torch.compile,
   determinism, while other processes compile.
2. Times: CUDA graphs over operands that together exceed the L2 cache, rounds of all competitors interleaved, medians.
   A kernel whose result is wrong is reported and not timed. DeepGEMM is an optional peer: importable or absent.

(Not named triton.py: a script's folder leads the import path, and the kernels import triton.)
Writes DIR/triton.json and prints one table. Times are microseconds a call; ratios are peer time / own time.
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

import triton_groups
from triton_checks import run_checks
from triton_groups import SECTIONS, SHAPES, Group


def time_group(group: Group, rounds: int = 8, target_us: float = 800.0) -> dict[str, Any]:
    """{name: median microseconds a call, or the reason why it was not timed}."""
    out: dict[str, Any] = {}
    graphs: dict[str, tuple[Any, int]] = {}
    for name, call in group.calls.items():
        try:
            poison = torch.full_like(call(0), float("nan")) if group.check else None
            del poison  # the allocator gives the next result the same memory
            y = call(0)
            error = group.check(name, y) if group.check else 0.0
            if not error < 6e-3:
                out[name] = f"wrong: worst row error {error:.2g}"
                continue
            once = _replay(_captured(group, call, 8)) / 8
            count = max(group.sets, min(400, int(target_us / once)))
            graphs[name] = _captured(group, call, count), count
        except Exception as e:
            out[name] = f"{type(e).__name__}: {str(e)[:160]}"
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, count) in graphs.items():
            times[name].append(_replay(graph) / count)
    return {**out, **{name: statistics.median(t[1:]) for name, t in times.items()}}


def _captured(group: Group, call: Callable[[int], Any], count: int) -> torch.cuda.CUDAGraph:
    """Enough calls for one graph that its own launch does not count."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i % group.sets)
    graph.replay()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


MOVED = {"swiglu": 5 + 4 / 128, "rmsnorm": 3 + 4 / 128, "copy": 4, "ue8m0x4": 3 + 1 / 128}
"""Bytes an element that a quantization moves; where not said: bf16 in, a byte and its part of a scale out."""


def share_of_copy(times: dict[str, Any], name: str) -> float:
    """Bandwidth of a quantization as a part of the copy's."""
    return float(times["copy"] / MOVED["copy"] * MOVED.get(name, 3 + 4 / 128) / times[name])


def table(records: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each group."""
    lines = []
    for name, times in records.items():
        good = {k: v for k, v in times.items() if isinstance(v, float)}
        if name.startswith("quantize"):
            rate = {n: f" ({share_of_copy(good, n):.2f} of copy)" if n != "empty" else "" for n in good}
            cells = [f"{n} {us:.2f}{rate[n]}" for n, us in good.items()]
        else:
            own = good.get("native", float("nan"))
            cells = [f"{n} {us:.1f}" + (f" ({us / own:.2f})" if n != "native" else "") for n, us in good.items()]
        lines.append(f"{name} [us]: " + ", ".join(cells))
        lines += [f"    {n}: {v}" for n, v in times.items() if isinstance(v, str)]
    return lines


def reach(records: dict[str, dict[str, Any]]) -> list[str]:
    """The figures that issue 4 asks for; what was not timed is left out."""

    def ratio(peer: str, own: str, ms: tuple[int, ...]) -> tuple[str, float]:
        groups = [records.get(f"gemm {m}x{n}x{k}", {}) for m in ms for n, k in SHAPES]
        found = [t[peer] / t[own] for t in groups if isinstance(t.get(peer), float) and isinstance(t.get(own), float)]
        name = f"time({peer}) / time({own}), M {' and '.join(map(str, ms))}"
        return name, statistics.geometric_mean(found) if len(found) == len(groups) else float("nan")

    figures: list[tuple[str, float, str]] = []
    many, one = records.get("quantize 8192x7168"), records.get("quantize 1x7168")
    if many and one:
        for name, want in (("row", 0.95), ("tma", 0.95), ("swiglu", 0.92)):
            figures.append((f"quantize {name}, of copy bandwidth", share_of_copy(many, name), f">= {want}"))
        figures.append(("quantize one row, of an empty kernel", one["row"] / one["empty"], "<= 1.5"))
    figures += [
        (*ratio("deep_gemm", "native", (1, 16)), ">= 1.1"), (*ratio("deep_gemm", "native", (4096,)), ">= 0.70"),
        (*ratio("bf16", "codec", (1, 16)), ">= 1.5"), (*ratio("bf16", "codec", (4096,)), "near 0.8"),
        (*ratio("bf16", "codec sm_80", (1, 16)), ""), (*ratio("bf16", "codec sm_80", (4096,)), ""),
        (*ratio("fp16 sm_80", "codec sm_80", (4096,)), ""), (*ratio("fp16 sm_80 wide", "codec sm_80", (4096,)), ""),
        (*ratio("bf16", "weight_only", (1, 16)), ""),
    ]  # fmt: skip
    return [f"{name}: {value:.3f} (wanted {want or '-'})" for name, value, want in figures if value == value]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--section", action="append", choices=list(SECTIONS))
    parser.add_argument("--warm", help="i/n: only compile what process i of n would time")
    parser.add_argument(
        "--budget", type=float, default=280.0, help="seconds; sections that would start later are skipped"
    )
    chosen = parser.parse_args(argv)
    sections = chosen.section or list(SECTIONS)
    if chosen.warm:
        return warm(sections, chosen)
    began = time.monotonic()
    properties = torch.cuda.get_device_properties(0)
    import triton

    head = {"device": properties.name, "torch": torch.__version__, "triton": triton.__version__}
    print(f"{head['device']}, torch {head['torch']}, triton {head['triton']}", flush=True)
    flags = [f"--section={s}" for s in sections] + ["--quick"] * chosen.quick
    processes = max(min((os.cpu_count() or 4) - 2, 28), 3)
    warmers = [
        subprocess.Popen([sys.executable, __file__, "--warm", f"{i}/{processes}", *flags],
                         stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        for i in range(processes)
    ]  # fmt: skip
    checks = {} if chosen.no_checks else run_checks()
    for process in warmers:
        try:
            process.wait(max(chosen.budget * 0.5 - (time.monotonic() - began), 0.05))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled and checked after {time.monotonic() - began:.0f} s", flush=True)
    records: dict[str, dict[str, Any]] = {}
    for section in sections:
        for group in SECTIONS[section](chosen.quick):
            if time.monotonic() - began > chosen.budget:
                print(f"{group.name}: skipped, {chosen.budget:g} s are over")
                break
            records[group.name] = time_group(group)
            print("\n".join(table({group.name: records[group.name]})), flush=True)
            chosen.out.mkdir(parents=True, exist_ok=True)
            result = {**head, "checks": checks, "microseconds": records}
            (chosen.out / "triton.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
            del group
            torch.cuda.empty_cache()
    print("\n".join(reach(records)))
    print(f"done after {time.monotonic() - began:.0f} s")
    return int(any(checks.values()))


def warm(sections: list[str], chosen: argparse.Namespace) -> int:
    """Compile this process's part. Two processes share the experts, whose weights fill memory."""
    rank, count = map(int, chosen.warm.split("/"))
    triton_groups.L2_BYTES = 1  # two operand sets are enough to compile
    for section in sections:
        alone = section == "grouped" or count < 3
        if count >= 3 and alone != (rank < 2):
            continue
        parts, part = (count, rank) if count < 3 else (2, rank) if alone else (count - 2, rank - 2)
        index = 0
        for group in SECTIONS[section](chosen.quick):
            for call in group.calls.values():
                index += 1
                if index % parts == part:
                    try:
                        call(0)
                    except Exception as e:
                        print(e)
            del group
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
