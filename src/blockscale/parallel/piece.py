"""The part of a stored matrix that one rank holds, cut wherever the plan says.

No value changes and nothing is requantized. A cut that falls inside a block keeps the block's scale on both sides:

- **Rows** (N). The part's scale rows are repeated to finer blocks, so that its first row starts one: rows 288 … 576 of
  a 128x128 weight become a 32x128 weight with the same data and each scale row repeated up to four times. That is a
  format like any other (`fp8_32x128`), so no kernel has to know.
- **Columns** (K). Activations are quantized in groups (1x128), and a group that lies on two ranks must still get one
  scale, from the largest magnitude of the *whole* group. The part is extended to whole groups by **guard columns**:
  weight zero, activation that largest magnitude. Whatever kernel quantizes the part then finds the group's own scale,
  and the guards add 0 to every sum. `linear.RowParallelLinear` agrees on the magnitudes (an all-reduce of one number
  for each cut group and row of x). No kernel has to know of this either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import Format, get_format
from ..numerics import Numerics
from ..tensor import BlockScaled
from .cuts import Range, grain

_LONE = 16
"""Guard columns for activations with one scale for a whole row: one would do, kernels like aligned K."""


@dataclass(frozen=True)
class Piece:
    """rows: ranges of N, laid end to end (one for a plain matrix; gate and up of a fused one). cols: a range of K.

    shape, format: of the stored matrix `[N, K]`. front, back: guard columns beside `cols`. cut: the activation groups
    that lie on more than one rank, by number; the whole row is group 0 where activations have one scale for it.
    group: columns of an activation group; None is a whole row. experts: those held of a stacked `[E, N, K]`.
    """

    shape: tuple[int, int]
    format: Format
    rows: tuple[Range, ...]
    cols: Range
    front: int = 0
    back: int = 0
    group: int | None = 1
    cut: tuple[int, ...] = ()
    experts: Range | None = None

    @property
    def part_shape(self) -> tuple[int, int]:
        """Logical `(n, k)` of the part, guards included."""
        return sum(e - b for b, e in self.rows), self.cols[1] - self.cols[0] + self.front + self.back

    @property
    def part_format(self) -> Format:
        rows = self.format.block[0]
        if rows is None or rows == 1:
            return self.format
        fine = grain(self.rows, rows)
        return self.format if fine == rows else with_block_rows(self.format, fine)

    @property
    def scale_rows(self) -> list[int]:
        """Row of the stored grid for each row of the part's grid."""
        rows = self.format.block[0]
        if rows is None:
            return [0]
        fine = grain(self.rows, rows) if rows > 1 else 1
        return [row // rows for b, e in self.rows for row in range(b, e, fine)]

    @property
    def scale_cols(self) -> Range:
        """Columns of the stored grid."""
        block = self.format.block[1]
        if block is None:
            return 0, 1
        end = min(self.cols[1] + self.back, self.shape[1])
        return (self.cols[0] - self.front) // block, -(-end // block)

    @property
    def whole(self) -> bool:
        return self.rows == ((0, self.shape[0]),) and self.cols == (0, self.shape[1]) and self.experts is None

    def guarded(self) -> tuple[int | None, int | None]:
        """Which of `cut` fill the guards in front and at the back; None where there are none to fill."""
        if not self.cut:
            return None, None
        if self.group is None:
            return None, 0
        find = {group: i for i, group in enumerate(self.cut)}
        front = find.get(self.cols[0] // self.group) if self.cols[0] % self.group else None
        back = find.get(self.cols[1] // self.group) if self.cols[1] % self.group else None
        return front, back


def with_block_rows(fmt: Format, rows: int) -> Format:
    """The same format in blocks of `rows` rows."""
    suffix = "_ue8m0" if fmt.scale_rounding == "pow2_ceil" else ""
    return get_format(f"{fmt.element.name}_{rows}x{fmt.block[1]}{suffix}")


def activation_group(fmt: Format, numerics: Numerics, static: bool) -> int | None:
    """Columns of x that share a scale: 1 when none is computed from x, None when it is a whole row (or all of x)."""
    act = numerics.activation_format(fmt)
    if act is None or (static and act.block == (None, None)):
        return 1
    return act.block[1]


def piece(
    shape: tuple[int, int],
    fmt: Format,
    *,
    rows: tuple[Range, ...] | None = None,
    cols: tuple[Range, ...] | None = None,
    rank: int = 0,
    group: int | None = 1,
    experts: Range | None = None,
) -> Piece:
    """The part with these rows and the `rank`-th of these ranges of columns (None: all).

    shape: `(n, k)` of the stored matrix. cols: the columns of every rank, which together say what groups are cut.
    group: see `activation_group`. experts: of a stacked tensor.
    """
    n, k = shape
    rows = rows or ((0, n),)
    if cols is None or len(cols) == 1:
        return Piece(shape, fmt, rows, (0, k), group=group, experts=experts)
    begin, end = cols[rank]
    block = fmt.block[1] or 1
    cut: tuple[int, ...]
    if group is None:
        unit, cut = block, (0,)  # the one group is the row
    else:
        unit = math.lcm(group, block)
        cut = tuple(sorted({b // group for b, _ in cols if b % group}))
    front = begin % unit
    back = 0 if end == k else min(-end % unit, -(-k // block) * block - end)
    return Piece(shape, fmt, rows, (begin, end), front, back + (_LONE if group is None else 0), group, cut, experts)


Rectangle = Callable[[int, Range, Range], Tensor]
"""(expert, rows, columns) -> that rectangle of a stored tensor; columns in stored elements, 0 for a lone matrix."""


def assemble_piece(part: Piece, data: Rectangle, scale: Rectangle) -> BlockScaled:
    """The part as a tensor of its own, from rectangles of the stored data (in bytes' columns) and scale grid.

    The levels (global and input scale) are the caller's to add.
    """
    experts = range(*part.experts) if part.experts else (None,)
    matrices = [_matrix(part, expert or 0, data, scale) for expert in experts]
    n, k = part.part_shape
    if part.experts is None:
        (found, scales), shape = matrices[0], (n, k)
    else:
        found, scales = (_stack([m[i] for m in matrices]) for i in (0, 1))
        shape = (len(matrices), n, k)  # type: ignore[assignment]
    return BlockScaled.trusted(found, scales, part.part_format, "row", shape)


def _matrix(part: Piece, expert: int, data: Rectangle, scale: Rectangle) -> tuple[Tensor, Tensor]:
    width = 2 if part.format.packed else 1
    cols = (part.cols[0] // width, -(-part.cols[1] // width))
    found = [data(expert, rows, cols) for rows in part.rows]
    dtype = found[0].dtype
    joined = torch.cat([_bytes(t) for t in found]) if len(found) > 1 else _bytes(found[0])
    if part.front or part.back:
        joined = F.pad(joined, (part.front // width, part.back // width))
    wanted = part.scale_rows
    first, last = min(wanted), max(wanted)
    grid = scale(expert, (first, last + 1), part.scale_cols)
    if wanted != list(range(first, last + 1)):
        index = torch.tensor(wanted, device=grid.device) - first
        grid = _bytes(grid)[index].view(grid.dtype)
    return joined.view(dtype), grid


def _stack(parts: list[Tensor]) -> Tensor:
    return torch.stack([_bytes(t) for t in parts]).view(parts[0].dtype)


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.element_size() == 1 else t


def take(weight: BlockScaled, part: Piece) -> BlockScaled:
    """The part of a weight `[N, K]` or `[E, N, K]` in memory (layout "row")."""

    def rectangle(t: Tensor) -> Rectangle:
        def cut_out(expert: int, rows: Range, cols: Range) -> Tensor:
            matrix = _bytes(t if t.dim() == 2 else t[expert])
            return matrix[rows[0] : rows[1], cols[0] : cols[1]].contiguous().view(t.dtype)

        return cut_out

    if part.experts is None and len(weight.shape) == 3:
        part = replace(part, experts=(0, weight.shape[0]))
    made = assemble_piece(part, rectangle(weight.data), rectangle(weight.scale))
    levels = {}
    for name in ("global_scale", "input_scale"):
        value = getattr(weight, name)
        levels[name] = value[slice(*part.experts)] if part.experts and value is not None and value.dim() else value
    return replace(made, **levels)
