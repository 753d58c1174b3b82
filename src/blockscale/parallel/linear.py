"""Linear layers of which every rank holds a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import BlockscaleError, ShapeError
from ..nn import BlockDiagonalLinear, DenseLinear, Linear
from ..tensor import BlockScaled
from .collectives import Group
from .cuts import Range
from .partial import OPS
from .piece import Piece
from .wire import Wire, wire_of


def refuse_gradient(x: Tensor) -> None:
    """Collectives here have no gradient: one that is asked for is an error, not a part of the truth."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise BlockscaleError("layers over ranks have no gradient: run under torch.no_grad() or torch.inference_mode()")


class ColumnParallelLinear(Linear):
    """Rows of N on each rank: `x @ part.T`. Bit-equal to the same rows of one device, for the same kernel.

    weight, bias: this rank's part. rows: of every rank, the ranges of N that it holds.
    gather: collect the outputs, `[..., N]` on every rank; otherwise `[..., n]` stays here.
    rows_of_x: x holds only this rank's tokens (all ranks alike many), which are gathered first, as `wire` says.

    forward: `x: [..., K]` (`[t, K]` for rows_of_x) -> `[..., N or n]` in x's dtype.
    """

    def __init__(
        self,
        weight: BlockScaled,
        bias: Tensor | None = None,
        *,
        group: Group,
        rows: tuple[tuple[Range, ...], ...],
        gather: bool = False,
        rows_of_x: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(weight, bias, **options)
        self.group, self.gather, self.rows_of_x = group, gather, rows_of_x
        self.widths = tuple(sum(e - b for b, e in ranges) for ranges in rows)
        if len(rows) != group.size or self.widths[group.rank] != self.out_features:
            raise ShapeError(
                f"ColumnParallelLinear: {len(rows)} parts with {list(self.widths)} rows for {group.size} ranks; "
                f"rank {group.rank} got a weight {list(weight.shape)}"
            )
        self.pieces = _in_order(rows) if any(len(ranges) > 1 for ranges in rows) else None
        self.wire: Wire = wire_of(self.format, self.numerics, weight.input_scale is not None)

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradient(x)
        y = self._gathered_rows(x) if self.rows_of_x else super().forward(x)
        if not self.gather:
            return y
        y = self.group.gather_columns(y, self.widths)
        return y if self.pieces is None else torch.cat([y[..., b:e] for b, e in self.pieces], -1)

    def _gathered_rows(self, x: Tensor) -> Tensor:
        return self.finish_gather(self.start_gather(x), x.dtype)

    def start_gather(self, x: Tensor) -> list[Tensor]:
        """Send this rank's rows to the others, as `wire` says; `finish_gather` waits and multiplies."""
        fmt = self.wire.format
        if fmt is None:
            return [self.group.start_all_gather(x)]
        q = ops.quantize(
            x, fmt.name, scale_rounding=fmt.scale_rounding, floor=self.numerics.act_floor, kernel=_family(self.kernel)
        )
        return [self.group.start_all_gather(q.data), self.group.start_all_gather(q.scale)]

    def finish_gather(self, sent: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Everybody's rows times this rank's part: `[rows, n]` in `dtype`."""
        fmt = self.wire.format
        if fmt is None:
            return super().forward(self.group.finish_all_gather(sent[0], dtype))
        data = self.group.finish_all_gather(sent[0], fmt.element.dtype)
        scale = self.group.finish_all_gather(sent[1], fmt.scale_dtype)
        buffers, names = self._buffers, self.names
        out = dtype if self.bias is None else torch.float32
        y: Tensor = OPS.scaled_linear(
            data, scale, buffers[names.data], buffers[names.scale], self.out_features, self.in_features,
            self.format.name, self.layout, fmt.name, out, _family(self.kernel) or "",
        )  # fmt: skip
        return y if self.bias is None else (y + self.bias.float()).to(dtype)

    def extra_repr(self) -> str:
        end = "gathered" if self.gather else "kept"
        wire = f", x gathered: {self.wire.reason}" if self.rows_of_x else ""
        return f"{super().extra_repr()}, rank {self.group.rank} of {self.group.size}, output {end}{wire}"


def _family(kernel: str | None) -> str | None:
    """An order for a linear, as one for the kernels beside it: "triton.block" also quantizes with "triton"."""
    return None if kernel is None else kernel.partition(".")[0]


def _in_order(rows: tuple[tuple[Range, ...], ...]) -> list[Range]:
    """Where each range lies in the gathered output, in the order of N."""
    found, at = [], 0
    for ranges in rows:
        for b, e in ranges:
            found.append((b, at, at + e - b))
            at += e - b
    return [(b, e) for _, b, e in sorted(found)]


class RowParallelLinear(Linear):
    """Columns of K on each rank: partial sums, added over ranks in fp32 and rounded once.

    weight: this rank's part, guard columns included. part: what it is of the whole. bias: the whole one.
    scatter: every rank keeps only its share of the rows of the result (their number must divide by the ranks).
    chunks: the rows are worked on in so many pieces, and one piece is added up while the next is multiplied.

    forward: `x: [..., k]`, this rank's columns -> `[..., N]` in x's dtype (`[rows / ranks, N]` for scatter).
    Differs from one device by the order of an fp32 sum.
    """

    def __init__(
        self,
        weight: BlockScaled,
        bias: Tensor | None = None,
        *,
        group: Group,
        part: Piece,
        scatter: bool = False,
        chunks: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(weight, bias, **options)
        self.group, self.part, self.scatter, self.chunks = group, part, scatter, chunks
        if self.in_features != part.part_shape[1]:
            raise ShapeError(f"RowParallelLinear: weight {list(weight.shape)} is not the part {part.part_shape}")

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradient(x)
        lead = x.shape[:-1]
        x = add_guards(x.reshape(-1, x.shape[-1]), self.part, self.group)
        y = self.finish([self._start(self._partial(rows)) for rows in x.chunk(self.chunks)], x.dtype)
        return y if self.scatter else y.view(*lead, self.out_features)

    def from_quantized(self, q: BlockScaled) -> Tensor:
        """The same for this rank's columns of an x that is quantized already (`swiglu_quantize`), in x's format.

        q: `[rows, k]` in layout "row" -> `[rows, N]` (or this rank's rows) in bf16. Only where no group is cut:
        raises ShapeError otherwise, because a cut group's scale is not known before the ranks agree on it.
        """
        return self.finish([self.start_quantized(rows) for rows in split_rows(q, self.chunks)], torch.bfloat16)

    def start_quantized(self, q: BlockScaled) -> Tensor:
        """Multiply and start to add up over ranks; `finish` waits."""
        if self.part.front or self.part.back:
            raise ShapeError(f"RowParallelLinear: x comes quantized, but the cut {self.part.cols} needs guard columns")
        buffers, names = self._buffers, self.names
        y = OPS.scaled_linear(
            q.data, q.scale, buffers[names.data], buffers[names.scale], self.out_features, self.in_features,
            self.format.name, self.layout, q.format.name, torch.float32, _family(self.kernel) or "",
        )  # fmt: skip
        return self._start(y)

    def _start(self, y: Tensor) -> Tensor:
        return self.group.start_reduce_scatter(y) if self.scatter else self.group.start_sum_in_place(y)

    def finish(self, sums: list[Tensor], dtype: torch.dtype) -> Tensor:
        """What was started, waited for, rounded once, and put together."""
        parts = [self._finish(self.group.wait(y), dtype) for y in sums]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _partial(self, x: Tensor) -> Tensor:
        buffers, names = self._buffers, self.names
        y: Tensor = OPS.partial_linear(
            x, buffers[names.data], buffers[names.scale], buffers[names.global_scale], buffers[names.input_scale],
            self.out_features, self.in_features, self.format.name, self.layout, self._policy, self.kernel or "",
        )  # fmt: skip
        return y

    def _finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return (y if self.bias is None else y + self.bias.float()).to(dtype)

    def extra_repr(self) -> str:
        cut = f", {len(self.part.cut)} activation groups cut" if self.part.cut else ""
        b, e = self.part.cols
        return f"{super().extra_repr()}, columns {b} … {e}, rank {self.group.rank} of {self.group.size}{cut}"


def split_rows(q: BlockScaled, chunks: int) -> list[BlockScaled]:
    """A quantized `[rows, K]` (a scale serves one row) in so many pieces."""
    if chunks == 1:
        return [q]
    parts = zip(q.data.view(torch.uint8).chunk(chunks), q.scale.chunk(chunks), strict=True)
    return [
        BlockScaled.trusted(data.view(q.data.dtype), scale, q.format, "row", (data.shape[0], q.shape[1]))
        for data, scale in parts
    ]


def add_guards(x: Tensor, part: Piece, group: Group) -> Tensor:
    """`x: [rows, k]` with the guard columns of `part` (see `piece`), agreed on with the other ranks."""
    front, back = part.guarded()
    if part.cut and x.shape[0]:
        agreed = group.all_reduce(_magnitudes(x, part), "max").to(x.dtype)
    if not part.front and not part.back:
        return x
    rows = x.shape[0]
    beside = []
    for columns, at in ((part.front, front), (part.back, back)):
        if at is None or rows == 0:
            beside.append(x.new_zeros(rows, columns))
        else:
            beside.append(agreed[:, at : at + 1].expand(rows, columns))
    return torch.cat([beside[0], x, beside[1]], -1)


def _magnitudes(x: Tensor, part: Piece) -> Tensor:
    """`[rows, len(part.cut)]` fp32: the largest finite |x| that this rank has of each cut group."""
    begin, end = part.cols
    found = []
    for number in part.cut:
        low, high = (begin, end) if part.group is None else (number * part.group, (number + 1) * part.group)
        low, high = max(low, begin) - begin, min(high, end) - begin
        if high > low:
            magnitude = x[:, low:high].abs().float()
            found.append(torch.where(magnitude < torch.inf, magnitude, 0.0).amax(-1))
        else:
            found.append(x.new_zeros(x.shape[0], dtype=torch.float32))
    return torch.stack(found, -1)


class BlockDiagonalPart(BlockDiagonalLinear):
    """Some of the groups of a block-diagonal linear (DeepSeek-V4's `o_a_proj`), for the heads of this rank.

    forward: `x: [..., any grouping of this rank's groups * K]` -> `[..., groups here, N]`.
    """

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        groups, _, k = self.shape
        return super().forward(x.reshape(*x.shape[:-2], groups, k))


class ColumnParallelDense(DenseLinear):
    """Rows of an unquantized `[N, K]` on each rank, outputs gathered: an output projection cut by vocabulary."""

    group: Group
    widths: tuple[int, ...]

    @classmethod
    def part(cls, weight: Tensor, bias: Tensor | None, group: Group, ranges: tuple[Range, ...]) -> ColumnParallelDense:
        """weight, bias: this rank's rows. ranges: of every rank."""
        self = cls(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        self.group, self.widths = group, tuple(e - b for b, e in ranges)
        return self

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradient(x)
        return self.group.gather_columns(super().forward(x), self.widths)
