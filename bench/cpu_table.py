"""The report of bench/cpu.py as Markdown: what was reached, the geometric means, then every row."""

from __future__ import annotations

import math
from typing import Any

Report = dict[str, list[dict[str, Any]]]
COLUMNS = ("bf16", "exact", "w8a8", "int16", "slices", "dequantize")


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def markdown(report: Report, big: tuple[tuple[int, int], ...]) -> str:
    lines = [
        "# CPU kernels",
        "",
        "Times of fp32 F.linear / time: larger is faster. Medians of interleaved rounds; `bench/cpu.py` says what the "
        "names mean.",
        "",
        *machines(report),
        "## Geometric means over the big shapes",
        "",
        "GB/s are those of the weights, one byte each, and their share of what a read reaches in the same rounds.",
        "",
        "| kernels | threads | M | shapes | bf16 | exact | w8a8 | int16 | exact GB/s | w8a8 GB/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (isa, threads, m), rows in groups([r for r in report["linear"] if (r["n"], r["k"]) in big]).items():
        cells = [cell(rows, name) for name in ("bf16", "exact", "w8a8", "int16")]
        rates = [rate(rows, name) if m <= 4 else "" for name in ("exact", "w8a8")]
        lines.append(f"| {isa} | {threads} | {m} | {len(rows)} | {' | '.join(cells + rates)} |")
    lines += [
        "",
        "## Every row",
        "",
        "| kernels | threads | N x K | M | fp32 ms | " + " | ".join(COLUMNS) + " | int16 error |",
    ]
    lines.append("|---" * (6 + len(COLUMNS)) + "|")
    order = sorted(report["linear"], key=lambda r: (r["isa"], r["threads"], -r["n"] * r["k"], r["m"]))
    for row in order:
        fp32 = row["seconds"]["fp32"][0]
        cells = [f"{fp32 / row['seconds'][c][0]:.2f}" if c in row["seconds"] else "" for c in COLUMNS]
        error = f"{row['errors']['int16']:.1e}" if "int16" in row["errors"] else ""
        head = f"{row['isa']} | {row['threads']} | {row['n']}x{row['k']} | {row['m']} | {fp32 * 1e3:.2f}"
        lines.append(f"| {head} | {' | '.join(cells)} | {error} |")
    return "\n".join([*lines, ""])


def machines(report: Report) -> list[str]:
    lines = []
    for head in report["machine"]:
        gbps = ", ".join(f"{name} {value:.1f}" for name, value in head["gigabytes_per_second"].items())
        micros = ", ".join(f"{name} {value:.1f}" for name, value in head["microseconds_192x576"].items())
        lines += [
            f"**{head['isa']}, {head['threads']} thread(s)**",
            "",
            f"- `{head['platform']}`, torch's own kernels for {head['torch_isa']}",
            f"- measured {head['measured']}, load of the machine when it began: {head['load'] or 'not noted'}",
            f"- GB/s: {gbps}",
            f"- microseconds a call, 192x576, M=1: {micros}",
            "",
        ]
    return lines


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """(instruction set, threads, M) -> its rows."""
    keys = sorted({(row["isa"], row["threads"], row["m"]) for row in rows})
    return {key: [r for r in rows if (r["isa"], r["threads"], r["m"]) == key] for key in keys}


def cell(rows: list[dict[str, Any]], name: str) -> str:
    speeds = [r["seconds"]["fp32"][0] / r["seconds"][name][0] for r in rows if name in r["seconds"]]
    return f"{geomean(speeds):.2f}" if len(speeds) == len(rows) else ""


def rate(rows: list[dict[str, Any]], name: str) -> str:
    gbps = geomean([r["n"] * r["k"] / r["seconds"][name][0] / 1e9 for r in rows])
    if not all("read" in r["seconds"] for r in rows):
        return f"{gbps:.1f}"
    share = geomean([r["seconds"]["read"][0] / 4 / r["seconds"][name][0] for r in rows])  # it reads 4 bytes a weight
    return f"{gbps:.1f} ({100 * share:.0f} %)"
