"""A sharding plan for people and for `inspect --json`: layers alike in one row."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from ..checkpoint import StoredLayer
from .plan import ShardingPlan, Split


def summarize(plan: ShardingPlan) -> dict[str, Any]:
    """{tp, ep, bytes: [by rank], replicated_bytes, rows: [...]}.

    rows: {layers, name (numbers as *), format, shape, kind, cut, parts, part_formats, cut_groups, reason}: `cut` is the
    dimension ("N", "K", "" for none), `parts` its sizes by rank, `part_formats` what re-blocked parts are called,
    `cut_groups` the activation groups that lie on two ranks.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    counts: Counter[tuple[Any, ...]] = Counter()
    for layer in plan.checkpoint.layers:
        split = plan.splits[layer.name]
        key = (re.sub(r"\d+", "*", layer.name), layer.format.name, layer.shape, split.kind, split.reason)
        counts[key] += 1
        if key not in rows:
            rows[key] = _row(plan, layer, split, key[0])
    for key, row in rows.items():
        row["layers"] = counts[key]
    found = sorted(rows.values(), key=lambda row: (row["kind"] == "unused", row["name"]))
    plain = [
        info.name for info in plan.checkpoint.plain if info.name not in plan.unread and info.name not in plan.plain
    ]
    tensors = plan.checkpoint.tensors
    whole = sum(tensors[name].nbytes for name in plain)
    for layer in plan.checkpoint.layers:
        if plan.splits[layer.name].kind == "replicated":
            whole += layer.nbytes
    return {
        "tp": plan.tp,
        "ep": plan.ep,
        "bytes": [plan.nbytes(rank) for rank in range(plan.tp)],
        "replicated_bytes": whole,
        "rows": found + [_plain_row(plan, name) for name in plan.plain],
    }


def _row(plan: ShardingPlan, layer: StoredLayer, split: Split, name: str) -> dict[str, Any]:
    cut, parts, formats, groups = "", list[int](), list[str](), 0
    if split.kind != "unused":
        ranks = (
            range(plan.tp) if split.owner is None else range(split.owner * plan.inner, (split.owner + 1) * plan.inner)
        )
        pieces = [piece for rank in ranks if (piece := plan.piece(layer, rank)) is not None]
        if len(split.cols) > 1:
            cut, parts = "K", [piece.cols[1] - piece.cols[0] for piece in pieces]
        elif len(split.rows) > 1:
            cut, parts = "N", [sum(e - b for b, e in piece.rows) for piece in pieces]
        formats = sorted({piece.part_format.name for piece in pieces} - {layer.format.name})
        groups = len(pieces[0].cut) if pieces else 0
    routed = split.owner is not None or split.experts is not None
    kind = split.kind
    if routed:
        kind = "expert" if plan.inner == 1 else f"expert, {split.kind}"  # type: ignore[assignment]
    return {
        "name": name, "format": layer.format.name, "shape": list(layer.shape), "kind": kind, "cut": cut,
        "parts": parts, "part_formats": formats, "cut_groups": groups, "reason": split.reason,
    }  # fmt: skip


def _plain_row(plan: ShardingPlan, name: str) -> dict[str, Any]:
    info, ranges = plan.checkpoint.tensors[name], plan.plain[name]
    return {
        "name": name, "format": info.dtype, "shape": list(info.shape), "kind": "gathered", "cut": "N",
        "parts": [e - b for b, e in ranges], "part_formats": [], "cut_groups": 0, "reason": "", "layers": 1,
    }  # fmt: skip
