"""The report of bench/gemm.py: geomeans by regime, every row, and what an eager call costs on the host."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch

from blockscale import ops
from blockscale.platform import detect
from shapes import REGIMES, regime

PEER_NAMES = ("deepgemm", "deepgemm_pdl", "cublaslt", "bf16")


def geomean(values: Iterable[float]) -> float:
    """exp of the mean logarithm; NaN of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def dispatch(n: int = 1536, k: int = 7168) -> dict[str, float]:
    """Host microseconds of one eager call at M=1, and what it is made of; medians of nine runs of 100 calls.

    linear: `ops.linear`; cube: the same for x of three dimensions; module: `nn.Linear`; bf16: torch's own; kernel: what
    the kernel bound, alone; launches: its two kernels started with parameters that lie ready, which is the raw cost of
    launching; empty: the allocation of y; triton: the same two kernels through Triton's launcher; block: `linear` by
    triton.block. overhead: linear - launches.
    """
    from blockscale import nn, quantize
    from blockscale.kernels.gluon import eager, gemm
    from blockscale.kernels.gluon import quantize as group

    sms = int(detect("cuda").value("sms") or 0)
    w = quantize(torch.randn(n, k, device="cuda"), "fp8_128x128")
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    cube = x.view(1, 1, k)
    module, other = nn.Linear(w), quantize(torch.randn(n, k, device="cuda"), "fp8_128x128")
    problem = ops.linear_problem(w, torch.bfloat16)
    act = problem.activation_format
    assert act is not None
    bound = eager.linear(problem)
    prepared = eager.Prepared(problem, x, w, None, torch.cuda.current_stream().cuda_stream)
    q = group.quantize(x, act, 1e-10)
    y = torch.empty(1, n, device="cuda", dtype=torch.bfloat16)
    first, second = (
        group.launch(x, q.data, q.scale, False, 1e-10),
        gemm.launch(q, w, None, y, prepared.config, sms, early=True),
    )
    dense = torch.randn(64, k, device="cuda", dtype=torch.bfloat16)
    calls = {
        "linear": lambda: ops.linear(x, w),
        "cube": lambda: ops.linear(cube, w),
        "kernel": lambda: bound(x, w.data, w.scale, None, None, None, 1),
        "launches": lambda: (prepared.quantize.enqueue(), prepared.multiply.enqueue()),
        "empty": lambda: x.new_empty(1, n),
        "triton": lambda: (first.run(), second.run()),
        "block": lambda: ops.linear(x, other, kernel="triton.block"),
        "module": lambda: module(x),
        "bf16": lambda: torch.nn.functional.linear(x, dense),
    }
    result = {}
    with torch.no_grad():
        for name, call in calls.items():
            for _ in range(5):
                call()
            torch.cuda.synchronize()
            spans = []
            for _ in range(9):
                start = time.perf_counter()
                for _ in range(100):
                    call()
                spans.append((time.perf_counter() - start) / 100 * 1e6)
                torch.cuda.synchronize()
            result[name] = round(sorted(spans)[4], 2)
    return {"overhead": round(result["linear"] - result["launches"], 2), **result}


def shipped(rows: list[dict], table: dict[str, dict[str, str]] | None = None) -> dict[str, dict[str, str]]:
    """The table that the kernels would ship: what was fastest on each shape that is not kept unseen, over `table`."""
    found = {weight: dict(by_m) for weight, by_m in (table or {}).items()}
    for row in rows:
        if row["config"] and not row["unseen"]:
            found.setdefault(f"{row['n']}x{row['k']}", {})[str(row["m"])] = str(row["config"])
    return {weight: dict(sorted(by_m.items(), key=lambda at: int(at[0]))) for weight, by_m in sorted(found.items())}


def summary(rows: list[dict], peer: str | None) -> dict[str, dict[str, float]]:
    """Geomean, worst and count of time(peer) / time(ours) by regime; None takes the best peer of each shape."""
    found: dict[str, list[float]] = {}
    for row in rows:
        times = dict(row["time_us"])
        ours = times.pop(row["ours"], math.nan)
        other = min(times.values(), default=math.nan) if peer is None else times.get(peer, math.nan)
        if not math.isnan(ours + other):
            found.setdefault(regime(row["m"]), []).append(other / ours)
    return {name: {"geomean": geomean(v), "worst": min(v), "shapes": len(v)} for name, v in found.items()}


def markdown(out: dict) -> str:
    """The report: geomeans by regime, then every row."""
    rows, env = out["rows"], out["environment"]
    lines = [
        f"# FP8 1x128 x 128x128 GEMM on one {env['device']}",
        "",
        f"{env['device']}, torch {env['torch']}, triton {env['triton']}, CUDA {env['cuda']}. CUDA graphs, operands rotated "  # noqa: E501
        f"past L2, replays interleaved, medians; {out.get('runs', 1)} runs, all of a row in one. Written by `python bench/gemm.py`.",  # noqa: E501
        "",
        "Ceilings measured: "
        + ", ".join(f"{k} {v:.{2 if k.endswith('_us') else 0}f}" for k, v in out["ceilings"].items()) + ".",
        "Host microseconds of an eager call (1x1536x7168): "
        + ", ".join(f"{k} {v}" for k, v in out["dispatch"].items()) + ".",
        "",
        "## time(peer) / time(ours), geomean (worst) over the shapes of a regime",
        "",
        "| regime | " + " | ".join([*PEER_NAMES, "best peer of each shape"]) + " |",
        "|---" * (len(PEER_NAMES) + 2) + "|",
    ]  # fmt: skip
    for title, seen in (("", False), (" (unseen shapes)", True)):
        part = [r for r in rows if r["unseen"] == seen]
        tables = [summary(part, peer) for peer in (*PEER_NAMES, None)]
        for name, _, _ in REGIMES:
            cells = [f"{t[name]['geomean']:.3f} ({t[name]['worst']:.2f})" if name in t else "-" for t in tables]
            lines.append(f"| {name}{title} | " + " | ".join(cells) + " |")
    lines += ["", "## Every shape, microseconds", "",
              "| M | N | K | ours | kernel | configuration | GB/s | TFLOP/s | " + " | ".join(PEER_NAMES) + " |",
              "|---" * (8 + len(PEER_NAMES)) + "|"]  # fmt: skip
    for row in rows:
        m, n, k, times = row["m"], row["n"], row["k"], row["time_us"]
        ours = times.get(row["ours"], math.nan)
        rate = (n * k + m * k + 2 * m * n) / ours / 1e3
        cells = [f"{times[p]:.1f} ({times[p] / ours:.2f})" if p in times else "-" for p in PEER_NAMES]
        old = "" if row.get("kernels") == out.get("kernels") else "*"
        lines.append(
            f"| {m}{old} | {n} | {k} | {ours:.2f} | {row['ours']} | {row['config']} | {rate:.0f} | "
            f"{2 * m * n * k / ours / 1e6:.0f} | "
            + " | ".join(cells) + " |"
        )  # fmt: skip
    if any(row.get("kernels") != out.get("kernels") for row in rows):
        lines += ["", "\\* From an earlier run, with an earlier version of the kernels."]
    faults = [f"{r['m']}x{r['n']}x{r['k']} {name}: {what}" for r in rows for name, what in r["faults"].items()]
    return "\n".join([*lines, "", *(["Faults:", *faults] if faults else ["No faults."]), ""])
