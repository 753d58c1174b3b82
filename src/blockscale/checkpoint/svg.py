"""Two plots as SVG text: points by series, and bars. Just enough for the report."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Dots = Mapping[str, Sequence[tuple[float, float]]]
"""Points (x, y) of each series. x = -1 is "no layer"."""
Bars = Mapping[int, int]

WIDTH, HEIGHT = 900, 330
LEFT, BOTTOM, TOP, RIGHT = 84, 46, 12, 250
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b4f9d", "#8c8c00", "#444444", "#a0522d")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, and three more."""


def dots(series: Dots, x_label: str, y_label: str) -> str:
    """A scatter plot with a legend, worst series first."""
    ordered = sorted(series, key=lambda name: -max(y for _, y in series[name]))
    points = [p for name in ordered for p in series[name]]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_high = max(y for _, y in points) * 1.04 or 1.0
    least = min(y for _, y in points)
    y_low = least * 0.98 if least > y_high * 0.6 else 0.0  # show differences where all errors are alike
    right = WIDTH - RIGHT
    parts = _frame(right, _ticks(y_low, y_high), (y_low, y_high), x_label, y_label)

    def place(x: float) -> float:
        return LEFT + 14 + (x - x_low) / max(1.0, x_high - x_low) * (right - LEFT - 28)

    for x in _whole_ticks(x_low, x_high):
        label = "–" if x < 0 else f"{x:g}"
        parts.append(_text(place(x), HEIGHT - BOTTOM + 17, label, "middle"))
    for i, name in enumerate(ordered):
        colour = COLOURS[i % len(COLOURS)]
        turn = i // len(COLOURS)
        parts += [_mark(place(x), _up(y, y_high, y_low), 3.4, colour, turn) for x, y in series[name]]
        if i < 16:
            y = TOP + 10 + 18 * i
            parts.append(_mark(right + 18, y - 4, 4, colour, turn))
            parts.append(_text(right + 28, y, _shortened(name), "start"))
    if len(ordered) > 16:
        parts.append(_text(right + 28, TOP + 10 + 18 * 16, f"… and {len(ordered) - 16} more", "start"))
    return _svg(parts, f"{y_label} by {x_label}")


def bars(counts: Bars, x_label: str, y_label: str) -> str:
    """A bar for each whole number from the first to the last key."""
    if not counts:
        return "<p>none</p>"
    low, high = min(counts), max(counts)
    top = max(counts.values()) * 1.1
    right = WIDTH - 12
    parts = _frame(right, _ticks(0.0, top), (0.0, top), x_label, y_label)
    width = (right - LEFT) / (high - low + 1)
    for key in range(low, high + 1):
        x, y = LEFT + (key - low) * width, _up(counts.get(key, 0), top)
        thin = min(width * 0.9, 60.0)
        x += (width - thin) / 2
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{thin:.1f}" height="{HEIGHT - BOTTOM - y:.1f}" fill="{COLOURS[0]}"/>'
        )
        if counts.get(key) and high - low < 20:  # a bar of one beside one of a million is not seen
            parts.append(_text(x + thin / 2, y - 4, _number(counts[key]), "middle"))
    for tick in _whole_ticks(low, high):
        parts.append(_text(LEFT + (tick - low + 0.5) * width, HEIGHT - BOTTOM + 17, f"{tick:g}", "middle"))
    return _svg(parts, f"{y_label} by {x_label}")


def _shortened(name: str) -> str:
    """What fits beside the plot: kinds differ at both ends."""
    return name if len(name) <= 30 else f"{name[:14]}…{name[-15:]}"


def _mark(x: float, y: float, size: float, colour: str, turn: int) -> str:
    """A dot; a square for series after the last colour."""
    if turn % 2 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}" opacity="0.75"/>'
    side = f'width="{2 * size}" height="{2 * size}"'
    return f'<rect x="{x - size:.1f}" y="{y - size:.1f}" {side} fill="{colour}" opacity="0.75"/>'


def _up(y: float, top: float, low: float = 0.0) -> float:
    return HEIGHT - BOTTOM - (y - low) / (top - low) * (HEIGHT - BOTTOM - TOP)


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:.4g}"


def _frame(right: float, ticks: Sequence[float], span: tuple[float, float], x_label: str, y_label: str) -> list[str]:
    parts = []
    for tick in ticks:
        y = _up(tick, span[1], span[0])
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d8dee4"/>')
        parts.append(_text(LEFT - 8, y + 4, _number(tick), "end"))
    parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" stroke="#1b1f24"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 8, x_label, "middle"))
    middle = (HEIGHT - BOTTOM) / 2
    turned = f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, y_label, "middle")}</g>'
    return [*parts, turned]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], label: str) -> str:
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#1b1f24"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(label)}" {style}>' + "".join(parts) + "</svg>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _whole_ticks(low: float, high: float) -> list[int]:
    step = max(1, math.ceil((high - low) / 12))
    return list(range(math.ceil(low), math.floor(high) + 1, step))
