"""Can a checkpoint be split over tensor-parallel ranks on block boundaries?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from .reader import StoredLayer

RANKS = range(1, 17)
_BY_COLUMNS = ("o_proj", "down_proj", "w2", "wo", "wo_b", "o_b_proj", "out_proj", "fc2", "dense_4h_to_h", "c_proj")
"""Layers whose input is split (row-parallel in Megatron's words): K is cut. All others are cut along N."""
_WHOLE = ("q_a_proj", "kv_a_proj_with_mqa", "wq_a", "wkv", "kv_proj", "indexer.wk", "gate", "e_proj", "h_proj")
"""Latent projections, which every rank holds whole."""

Fit = Literal["whole", "aligned", "inside", "uneven"]
"""whole: not split. aligned: every rank gets whole blocks. inside: equal shares that cut a block, whose scale is
then kept on both sides (or the weight re-blocked). uneven: the dimension does not divide by the ranks."""


def fit(layer: StoredLayer, ranks: int) -> Fit:
    """How a layer splits over `ranks` ranks."""
    if ranks == 1 or _is_whole(layer):
        return "whole"
    size, block = _cut(layer)
    if size % ranks:
        return "uneven"
    return "aligned" if (size // ranks) % block == 0 else "inside"


def _is_whole(layer: StoredLayer) -> bool:
    return any(layer.name.endswith(f".{suffix}") for suffix in _WHOLE)


def _by_columns(layer: StoredLayer) -> bool:
    return layer.name.rsplit(".", 1)[-1] in _BY_COLUMNS


def _cut(layer: StoredLayer) -> tuple[int, int]:
    """Elements of the dimension that is cut, and of a block in it (1 where one scale serves the whole dimension)."""
    axis = 1 if _by_columns(layer) else 0
    size, block = layer.shape[-2:][axis], layer.format.block[axis]
    return size, block or 1


def kind_of(name: str) -> str:
    """`model.layers.3.mlp.experts.17.w1` -> `model.layers.*.mlp.experts.*.w1`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def verdicts(layers: Sequence[StoredLayer]) -> list[dict[str, Any]]:
    """For 1 … 16 ranks: how many layers are of each Fit, and which kinds are not on block boundaries."""
    rows = []
    for ranks in RANKS:
        fits = [fit(layer, ranks) for layer in layers]
        found: dict[str, Any] = {"ranks": ranks}
        found |= {kind: fits.count(kind) for kind in ("whole", "aligned", "inside", "uneven")}
        found["kinds"] = {
            which: list(dict.fromkeys(kind_of(layer.name) for layer, f in zip(layers, fits, strict=True) if f == which))
            for which in ("inside", "uneven")
            if which in fits
        }
        found["verdict"] = "uneven" if found["uneven"] else "re-block" if found["inside"] else "on block boundaries"
        rows.append(found)
    return rows
