"""How well a checkpoint divides over 1 to 16 ranks: the sharding plan for each number of them, in one row."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Literal

from ..checkpoint import Checkpoint, StoredLayer
from ..parallel.errors import PlanError
from ..parallel.plan import ShardingPlan
from ..parallel.planner import plan_sharding
from ..policy import Policy

RANKS = range(1, 17)

Fit = Literal["whole", "aligned", "inside", "unused"]
"""whole: on every rank. aligned: cut, and every rank gets whole blocks. inside: a block, or an activation group, is
cut, and what belongs to it is kept on both sides. unused: not part of the model that runs."""


def verdicts(checkpoint: Checkpoint, policy: Policy) -> list[dict[str, Any]]:
    """For 1 … 16 ranks, without expert parallelism: {ranks, verdict, whole, aligned, inside, unused, unequal, kinds,
    reasons}.

    verdict: "on block boundaries", "re-block" where something is cut inside a block, "none" where there is no plan.
    whole … unused: weights of each Fit. unequal: those of which some rank gets more than another. kinds: names of
    those "inside" and "unequal", numbers as *. reasons: why weights are not cut better, or why there is no plan.
    """
    return [_verdict(checkpoint, ranks, policy) for ranks in RANKS]


def _verdict(checkpoint: Checkpoint, ranks: int, policy: Policy) -> dict[str, Any]:
    found: dict[str, Any] = {"ranks": ranks}
    fits: Counter[str] = Counter()
    kinds: dict[str, dict[str, None]] = {"inside": {}, "unequal": {}}
    reasons: dict[str, None] = {}
    try:
        plan = plan_sharding(checkpoint, ranks, 1, policy)
    except PlanError as e:
        plan, verdict = None, "none"
        reasons[str(e)] = None
    if plan is not None:
        known: dict[Any, tuple[Fit, bool]] = {}
        for layer in checkpoint.layers:
            split = plan.splits[layer.name]
            key = (layer.format, layer.shape, split)
            fit, unequal = known[key] if key in known else known.setdefault(key, _fit(plan, layer))
            fits[fit] += 1
            fits["unequal"] += unequal
            for kind, holds in (("inside", fit == "inside"), ("unequal", unequal)):
                if holds:
                    kinds[kind][kind_of(layer.name)] = None
            if split.reason:
                reasons[split.reason] = None
        verdict = "re-block" if fits["inside"] else "on block boundaries"
    found |= {"verdict": verdict} | {fit: fits[fit] for fit in ("whole", "aligned", "inside", "unused", "unequal")}
    return found | {"kinds": {kind: list(names) for kind, names in kinds.items()}, "reasons": list(reasons)}


def _fit(plan: ShardingPlan, layer: StoredLayer) -> tuple[Fit, bool]:
    """The layer's fit, and whether shares differ."""
    split = plan.splits[layer.name]
    if split.kind == "unused":
        return "unused", False
    pieces = [piece for rank in range(plan.tp) if (piece := plan.piece(layer, rank)) is not None]
    if len(split.rows) == 1 and len(split.cols) == 1:
        return "whole", False
    block = layer.format.block[1] or 1
    inside = any(p.part_format != layer.format or p.cut or p.cols[0] % block for p in pieces)
    sizes = {(sum(e - b for b, e in p.rows), p.cols[1] - p.cols[0]) for p in pieces}
    return "inside" if inside else "aligned", len(sizes) > 1


def kind_of(name: str) -> str:
    """`model.layers.3.mlp.experts.17.w1` -> `model.layers.*.mlp.experts.*.w1`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
