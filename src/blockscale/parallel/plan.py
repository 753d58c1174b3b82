"""The sharding plan: which rank holds which part of which tensor. Pure data, made from headers and config.

Ranks are numbered `0 … tp - 1`. Dense layers are spread over all of them; experts lie in `ep` groups of `tp / ep`
ranks: rank r has the experts of group `r // (tp / ep)`, and where a group has several ranks, each holds a slice of
every one of those experts. `planner` makes the plan, `families` says which cuts belong together, `piece` how a part is
cut out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from ..checkpoint import Checkpoint, StoredLayer
from .cuts import Range
from .piece import Piece, piece

Kind = Literal["column", "row", "gathered", "replicated", "unused"]
"""column: rows of N, output stays split. gathered: the same, output collected. row: K, outputs summed.
unused: a layer that the model does not have (multi-token prediction); no rank reads it."""


@dataclass(frozen=True)
class Split:
    """How one stored weight is divided.

    rows, cols: for each part, its ranges of N and its range of K; one entry where that dimension is not cut.
    group: columns of an activation group (None: a whole row). owner: the expert group that holds it, of a lone expert.
    experts: of a stack, the experts of each group. reason: why it is not cut better.
    """

    kind: Kind
    rows: tuple[tuple[Range, ...], ...]
    cols: tuple[Range, ...]
    group: int | None = 1
    owner: int | None = None
    experts: tuple[Range, ...] | None = None
    reason: str = ""


@dataclass(frozen=True)
class ShardingPlan:
    """splits: by the name of a stored layer. plain: ranges of rows by rank, of unquantized tensors that are cut.

    tp, ep: see the module. unread: plain tensors that no rank reads.
    """

    checkpoint: Checkpoint = field(repr=False)
    tp: int
    ep: int
    splits: Mapping[str, Split]
    plain: Mapping[str, tuple[Range, ...]]
    unread: frozenset[str]

    @property
    def inner(self) -> int:
        """Ranks that share each expert."""
        return self.tp // self.ep

    def piece(self, layer: StoredLayer, rank: int) -> Piece | None:
        """The part of a layer that a rank holds, or None."""
        split = self.splits[layer.name]
        if split.kind == "unused" or split.owner not in (None, rank // self.inner):
            return None
        routed = split.owner is not None or split.experts is not None
        part = rank % self.inner if routed else rank
        experts = split.experts[rank // self.inner] if split.experts else None
        n, k = layer.shape[-2:]
        return _piece((n, k), layer, split, part, experts)

    def nbytes(self, rank: int) -> int:
        """Bytes of weights that a rank reads and holds: its share."""
        return self.layer_bytes(rank) + sum(self.plain_bytes(rank).values())

    def layer_bytes(self, rank: int) -> int:
        """Of block-scaled weights."""
        return sum(_part_bytes(self, layer, part) for layer, part in self.pieces(rank))

    def plain_bytes(self, rank: int) -> dict[str, int]:
        """Of each unquantized tensor."""
        found = {}
        for info in self.checkpoint.plain:
            if info.name in self.unread:
                continue
            ranges = self.plain.get(info.name)
            share = info.nbytes
            if ranges:
                share = info.nbytes // info.shape[0] * (ranges[rank][1] - ranges[rank][0])
            found[info.name] = share
        return found

    def pieces(self, rank: int) -> Iterator[tuple[StoredLayer, Piece]]:
        """The layers of which a rank holds a part."""
        for layer in self.checkpoint.layers:
            part = self.piece(layer, rank)
            if part is not None:
                yield layer, part


@lru_cache(maxsize=4096)
def _cached(
    shape: tuple[int, int], fmt: object, rows: tuple[Range, ...], cols: tuple[Range, ...], rank: int,
    group: int | None, experts: Range | None,
) -> Piece:  # fmt: skip
    return piece(shape, fmt, rows=rows, cols=cols, rank=rank, group=group, experts=experts)  # type: ignore[arg-type]


def _piece(shape: tuple[int, int], layer: StoredLayer, split: Split, part: int, experts: Range | None) -> Piece:
    rows = split.rows[part if len(split.rows) > 1 else 0]
    return _cached(shape, layer.format, rows, split.cols, part, split.group, experts)


def _part_bytes(plan: ShardingPlan, layer: StoredLayer, part: Piece) -> int:
    """Bytes of a part as they are read: data, its scales (each once), levels."""
    tensors, names = plan.checkpoint.tensors, layer.parts
    count = part.experts[1] - part.experts[0] if part.experts else 1
    rows = sum(e - b for b, e in part.rows)
    data = tensors[names.data]
    n, k = layer.shape[-2:]
    stack = math.prod(layer.shape[:-2])
    width = data.nbytes / (stack * n * k)
    grid_rows, grid_cols = layer.format.scale_shape(n, k)
    first, last = min(part.scale_rows), max(part.scale_rows) + 1
    begin, end = part.scale_cols
    scale = tensors[names.scale].nbytes // (stack * grid_rows * grid_cols)
    levels = sum(tensors[name].nbytes for name in (names.global_scale, names.input_scale) if name)
    read = int(rows * (part.cols[1] - part.cols[0]) * width) + (last - first) * (end - begin) * scale
    return count * read + levels
