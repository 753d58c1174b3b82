"""Can a checkpoint be split over tensor-parallel ranks on block boundaries?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from .reader import StoredLayer

RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
_BY_COLUMNS = ("o_proj", "down_proj", "w2", "wo", "wo_b", "o_b_proj", "out_proj", "fc2", "dense_4h_to_h", "c_proj")
"""Layers whose input is split (row-parallel in Megatron's words): K is cut. All others are cut along N."""
_WHOLE = ("q_a_proj", "kv_a_proj_with_mqa", "wq_a", "wkv", "kv_proj", "indexer.wk", "gate", "e_proj", "h_proj")
"""Latent projections, which every rank holds whole."""

Fit = Literal["whole", "aligned", "inside", "uneven"]
"""whole: not split. aligned: every rank gets whole blocks. inside: equal shares that cut a block, whose scale is
then kept on both sides (or the weight re-blocked). uneven: the dimension does not divide by the ranks."""


def fit(layer: StoredLayer, ranks: int) -> Fit:
    """How a layer splits over `ranks` ranks."""
    if ranks == 1 or any(layer.name.endswith(f".{suffix}") for suffix in _WHOLE):
        return "whole"
    rows, cols = layer.shape[-2:]
    block_rows, block_cols = layer.format.block_shape(rows, cols)
    by_columns = layer.name.rsplit(".", 1)[-1] in _BY_COLUMNS
    size, block = (cols, block_cols) if by_columns else (rows, block_rows)
    if size % ranks:
        return "uneven"
    one_scale = (layer.format.block[1] if by_columns else layer.format.block[0]) is None
    if one_scale or (size // ranks) % block == 0:
        return "aligned"
    return "inside"


def verdicts(layers: Sequence[StoredLayer]) -> list[dict[str, Any]]:
    """For 1 … 16 ranks: counts by Fit, and one example of each that is not aligned."""
    rows = []
    for ranks in RANKS:
        fits = [fit(layer, ranks) for layer in layers]
        found: dict[str, Any] = {"ranks": ranks}
        found |= {kind: fits.count(kind) for kind in ("whole", "aligned", "inside", "uneven")}
        found["examples"] = {kind: layers[fits.index(kind)].name for kind in ("inside", "uneven") if kind in fits}
        found["verdict"] = "uneven" if found["uneven"] else "re-block" if found["inside"] else "on block boundaries"
        rows.append(found)
    return rows
