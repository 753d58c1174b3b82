"""What a job changed, for machines (`quantization_report.json`) and for people (`quantization_report.html`).

The page is one file without scripts or links: plots are SVG, drawn here, so nothing needs to be installed to make or
to read it.
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .svg import Bars, Dots, bars, dots
from .writer import write_json, write_text

REPORT = "quantization_report.json"
PAGE = "quantization_report.html"
_KINDS = re.compile(r"(?:^|\.)(?:layers|h|blocks|mtp)\.(\d+)\.(.*)")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100%; font-size: 13px; white-space: nowrap }
th { text-align: left; border-bottom: 1px solid #1b1f24 }
td, th { padding: .25rem .8rem .25rem .3rem } td.n { text-align: right; font-variant-numeric: tabular-nums }
th.n { text-align: right } tr:nth-child(even) td { background: #f4f6f8 } p.note { color: #57606a }
svg { width: 100%; height: auto } code { font-size: 12.5px }
"""


def write_report(folder: Path, what: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Both files, from the records of a job's steps. what: e.g. the format, for the title."""
    hidden = ("step", "checksum")
    tensors = [{k: v for k, v in r.items() if k not in hidden} for r in records if "relative_error" in r]
    copied = sum(r["step"] == "copy" for r in records)
    summary = {"what": what, "tensors": len(tensors), "copied": copied, **error_summary(records)}
    summary["left"] = left_alone(records)
    write_json(folder / REPORT, {"summary": summary, "tensors": tensors})
    write_text(folder / PAGE, page(what, summary, tensors))


def error_summary(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """{measured: weights, mean_relative_error, max_relative_error, worst: up to ten names, the worst first}."""
    found = sorted(
        ((float(r["relative_error"]), str(r["name"])) for r in records if "relative_error" in r), reverse=True
    )
    return {
        "measured": len(found),
        "mean_relative_error": sum(error for error, _ in found) / max(1, len(found)),
        "max_relative_error": found[0][0] if found else 0.0,
        "worst": [name for _, name in found[:10]],
    }


def left_alone(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """[{name, shape, reason}] of what one would expect to be quantized, and is not."""
    return [{"name": r["name"], "shape": r["shape"], "reason": r["left"]} for r in records if r.get("left")]


def page(what: str, summary: Mapping[str, Any], tensors: Sequence[Mapping[str, Any]]) -> str:
    """The HTML page."""
    title = f"Quantization report: {html.escape(what)}"
    body = [f"<h1>{title}</h1>", f"<p>{_sentence(summary)}</p>"]
    if left := summary.get("left"):
        body += ["<h2>Left as they were</h2>", _left_table(left)]
    changed = [t for t in tensors if float(t["relative_error"]) > 0]
    if changed:
        body += [
            "<h2>Error by layer and kind</h2>",
            f"<p class=note>Relative error ‖x − y‖ / ‖x‖ of each weight, on an axis that need not start at zero"
            f"{_measured(tensors)}.</p>",
            dots(_by_layer(tensors), "layer", "relative error"),
        ]
    if scales := _scales(tensors):
        body += [
            "<h2>Scales</h2>",
            "<p class=note>How many block scales lie between 2<sup>e</sup> and 2<sup>e+1</sup>.</p>",
            bars(scales, "exponent e", "scales"),
        ]
    if changed:
        worst = sorted(changed, key=lambda t: -float(t["relative_error"]))[:10]
        body += [f"<h2>The {'ten ' if len(worst) == 10 else ''}worst</h2>", _table(worst)]
    if tensors:
        body += ["<h2>By kind</h2>", _kinds_table(tensors)]
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{title}</title>\n<style>{_STYLE}</style>\n"
        + "\n".join(body)
        + "\n</html>\n"
    )


def _sentence(summary: Mapping[str, Any]) -> str:
    counts = f"{summary['tensors']} weights written in the new format, {summary['copied']} tensors copied as they were."
    if not summary["max_relative_error"]:
        return f"{counts} No value changed." if summary["tensors"] else counts
    mean, worst = summary["mean_relative_error"], summary["max_relative_error"]
    return f"{counts} Relative error {_error(mean)} on average, {_error(worst)} at worst."


def _measured(tensors: Sequence[Mapping[str, Any]]) -> str:
    """Which share of the elements the errors were measured on, if not all."""
    total = sum(math.prod(t["shape"]) for t in tensors)
    measured = sum(int(t.get("measured", math.prod(t["shape"]))) for t in tensors)
    return f"; measured on {measured / total:.1%} of the elements" if measured < total else ""


def _error(value: float) -> str:
    return "0" if value == 0 else f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"


def kind_of(name: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp.experts.17.up_proj` -> (3, "mlp.experts.up_proj")."""
    match = _KINDS.search(name)
    if match is None:
        return None, name
    return int(match[1]), re.sub(r"\.\d+(?=\.|$)", "", match[2])


def _by_layer(tensors: Sequence[Mapping[str, Any]]) -> Dots:
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for t in tensors:
        layer, kind = kind_of(str(t["name"]))
        series[kind].append((float(layer if layer is not None else -1), float(t["relative_error"])))
    return dict(series)


def _scales(tensors: Sequence[Mapping[str, Any]]) -> Bars:
    counts: Counter[int] = Counter()
    for t in tensors:
        counts.update({int(e): int(n) for e, n in t.get("scales", {}).items()})
    return dict(sorted(counts.items()))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "<tr><th>weight<th>shape<th class=n>relative error<th class=n>SQNR, dB<th class=n>clipped<th class=n>to zero"
    lines = [
        f"<tr><td><code>{html.escape(str(t['name']))}</code><td>{' × '.join(map(str, t['shape']))}"
        f"<td class=n>{_error(float(t['relative_error']))}<td class=n>{_decibel(t)}"
        f"<td class=n>{float(t.get('clipped', 0)):.2%}<td class=n>{float(t.get('zeros', 0)):.2%}"
        for t in rows
    ]
    return "<table>" + "\n".join([head, *lines]) + "</table>"


def _left_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Alike ones in one row."""
    groups = Counter((kind_of(str(r["name"]))[1], tuple(r["shape"]), str(r["reason"])) for r in rows)
    head = "<tr><th>kind<th class=n>weights<th>shape<th>why they are not quantized"
    lines = [
        f"<tr><td><code>{html.escape(kind)}</code><td class=n>{count}<td>{' × '.join(map(str, shape))}"
        f"<td>{html.escape(reason)}"
        for (kind, shape, reason), count in groups.items()
    ]
    return "<table>" + "\n".join([head, *lines]) + "</table>"


def _decibel(t: Mapping[str, Any]) -> str:
    value = t.get("sqnr_db")
    return f"{float(value):.1f}" if value is not None and math.isfinite(float(value)) else "exact"


def _kinds_table(tensors: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[str, list[float]] = defaultdict(list)
    for t in tensors:
        groups[kind_of(str(t["name"]))[1]].append(float(t["relative_error"]))
    head = "<tr><th>kind<th class=n>weights<th class=n>mean<th class=n>worst"
    lines = [
        f"<tr><td><code>{html.escape(kind)}</code><td class=n>{len(e)}<td class=n>{_error(sum(e) / len(e))}"
        f"<td class=n>{_error(max(e))}"
        for kind, e in sorted(groups.items(), key=lambda item: -max(item[1]))
    ]
    return "<table>" + "\n".join([head, *lines]) + "</table>"
