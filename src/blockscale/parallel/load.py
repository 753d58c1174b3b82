"""One rank's part of a checkpoint: only its own byte ranges are read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint import StoredLayer
from ..checkpoint.ranges import RangeReader
from ..checkpoint.reader import scales_of
from ..errors import CheckpointError
from ..tensor import BlockScaled
from .cuts import Range
from .piece import Piece, assemble_piece
from .plan import ShardingPlan


class RankCheckpoint:
    """What rank `rank` of a plan reads.

    bytes_read: so far. share: what the plan says that this rank reads.
    """

    def __init__(self, plan: ShardingPlan, rank: int) -> None:
        self.plan, self.rank = plan, rank
        self._reader = RangeReader()
        self._layers = {layer.name: layer for layer in plan.checkpoint.layers}

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    @property
    def share(self) -> int:
        return self.plan.nbytes(self.rank)

    def close(self) -> None:
        self._reader.close()

    def piece(self, layer: StoredLayer) -> Piece | None:
        """The part that this rank holds, or None."""
        return self.plan.piece(self._layers[layer.name], self.rank)

    def local(self, layer: StoredLayer) -> StoredLayer:
        """The layer as this rank has it: shape and format of its part. Raises CheckpointError when it has none."""
        part = self._need(layer.name)
        lead = () if part.experts is None else (part.experts[1] - part.experts[0],)
        return replace(layer, shape=(*lead, *part.part_shape), format=part.part_format)

    def load(self, name: str) -> BlockScaled:
        """This rank's part of a layer, read now. Raises CheckpointError, also for scales that cannot multiply."""
        part, layer = self._need(name), self._layers[name]
        tensors, names = self.plan.checkpoint.tensors, layer.parts
        data, scale = tensors[names.data], tensors[names.scale]
        n, k = layer.shape[-2:]
        grid = layer.format.scale_shape(n, k)
        stack = layer.shape[0] if len(layer.shape) == 3 else 1

        def data_of(expert: int, rows: Range, cols: Range) -> Tensor:
            return self._reader.rectangle(data, (expert * n + rows[0], expert * n + rows[1]), cols)

        def scale_of(expert: int, rows: Range, cols: Range) -> Tensor:
            at = expert * grid[0]
            folded = (stack * grid[0], grid[1])
            found = self._reader.rectangle(scale, (at + rows[0], at + rows[1]), cols, folded)
            return found.view(torch.float8_e8m0fnu) if found.dtype == torch.uint8 else found

        made = assemble_piece(part, data_of, scale_of)
        levels = {name: self._reader.tensor(tensors[name]) for name in (names.global_scale, names.input_scale) if name}
        checked = scales_of(self.local(layer), {names.scale: made.scale, **levels}, self.plan.checkpoint.quantization)
        return replace(made, scale=checked.scale, global_scale=checked.global_scale, input_scale=checked.input_scale)

    def rows(self, name: str) -> Tensor:
        """This rank's rows of an unquantized tensor: those that the plan gives it, or all."""
        info = self.plan.checkpoint.tensors[name]
        ranges = self.plan.plain.get(name)
        if ranges is None:
            return self._reader.tensor(info)
        return self._reader.rectangle(info, ranges[self.rank], (0, info.shape[-1]))

    def _need(self, name: str) -> Piece:
        part = self.plan.piece(self._layers[name], self.rank) if name in self._layers else None
        if part is None:
            raise CheckpointError(f"{self.plan.checkpoint.path}: rank {self.rank} has no part of {name}")
        return part
