"""A roofline picture of a GEMM report, as SVG: each shape's rate over its operations per byte, under two ceilings."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

WIDTH, HEIGHT, MARGIN = 900, 560, 70
X_RANGE, Y_RANGE = (1.0, 1e4), (1.0, 3e3)
COLORS = {"ours": "#0b6e4f", "deepgemm": "#c0392b"}
FP8_OVER_BF16 = 2.0


def _place(x: float, y: float) -> tuple[float, float]:
    """Pixels of (operations per byte, TFLOP/s), both on logarithmic axes."""
    across = math.log(x / X_RANGE[0]) / math.log(X_RANGE[1] / X_RANGE[0])
    up = math.log(y / Y_RANGE[0]) / math.log(Y_RANGE[1] / Y_RANGE[0])
    return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="13" text-anchor="{anchor}">{words}</text>'


def draw(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """Write the picture. report: the JSON that bench/gemm.py writes: `ceilings`, `environment`, `rows`."""
    read = report["ceilings"]["read_gb_s"] / 1e3  # TB/s
    peak = report["ceilings"]["bf16_tflop_s"] * FP8_OVER_BF16
    knee = peak / read
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (_place(1, read), _place(knee, peak), _place(X_RANGE[1], peak)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<polyline points="{line}" fill="none" stroke="black"/>',
        _text(WIDTH / 2, 30, f"FP8 1x128 x 128x128 GEMM, {report['environment']['device']}"),
        _text(WIDTH / 2, HEIGHT - 20, "operations per byte of operands and result"),
        _text(MARGIN, MARGIN - 12, f"TFLOP/s; ceilings: read {read:.2f} TB/s, twice the bf16 rate {peak:.0f}", "start"),
    ]
    for power in range(5):
        x, y = _place(10**power, 1)
        parts.append(_text(x, y + 18, f"{10**power}"))
        if 10**power <= Y_RANGE[1]:
            x, y = _place(1, 10**power)
            parts.append(_text(x - 8, y + 4, f"{10**power}", "end"))
    for row in report["rows"]:
        m, n, k = row["m"], row["n"], row["k"]
        work, moved = 2 * m * n * k, n * k + m * k + 2 * m * n
        for name, color in COLORS.items():
            time = row["time_us"].get(row["ours"] if name == "ours" else name)
            if time:
                x, y = _place(work / moved, work / time / 1e6)
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}" fill-opacity="0.6"/>')
    for i, (name, color) in enumerate(COLORS.items()):
        parts.append(f'<circle cx="{WIDTH - 190}" cy="{HEIGHT - 130 + 22 * i}" r="5" fill="{color}"/>')
        parts.append(_text(WIDTH - 178, HEIGHT - 126 + 22 * i, name, "start"))
    path.write_text("\n".join([*parts, "</svg>", ""]))
