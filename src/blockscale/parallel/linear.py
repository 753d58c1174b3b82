"""Linear layers of which every rank holds a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import BlockscaleError, ShapeError
from ..formats import Format
from ..layouts import convert
from ..nn import BlockDiagonalLinear, DenseLinear, Linear
from ..tensor import BlockScaled
from .collectives import Arriving, Group
from .cuts import Range
from .partial import OPS, layout_read
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
    rows_of_x: x holds only this rank's tokens (as many as any other); they are gathered first, as `wire` says.

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

    def start_gather(self, x: Tensor) -> Arriving:
        """Send this rank's rows to the others, as `wire` says; `finish_gather` waits and multiplies."""
        return self.group.start_gather(self.rows_to_send(x))

    def rows_to_send(self, x: Tensor) -> list[Tensor]:
        """x as it travels: itself, or quantized data and scales. Of several layers, they may travel together."""
        fmt = self.wire.format
        if fmt is None:
            return [x]
        q = ops.quantize(
            x, fmt.name, scale_rounding=fmt.scale_rounding, floor=self.numerics.act_floor, kernel=family(self.kernel)
        )
        return [q.data, q.scale]

    def send_quantized(self, q: BlockScaled) -> Arriving:
        """The same for rows in the wire's format (`ops.rmsnorm_quantize` makes them without a step between)."""
        if q.format != self.wire.format:
            raise ShapeError(f"ColumnParallelLinear: x travels as {self.wire.format}, got {q.format}")
        return self.group.start_gather([q.data, q.scale])

    def finish_gather(self, sent: Arriving, dtype: torch.dtype) -> Tensor:
        """Everybody's rows times this rank's part: `[rows, n]` in `dtype`."""
        return self.multiply_sent(sent.whole(), dtype)

    def multiply_sent(self, rows: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The same for rows that are here, as `Arriving` gives them."""
        fmt = self.wire.format
        if fmt is None:
            return super().forward(rows[0])
        buffers, names = self._buffers, self.names
        out = dtype if self.bias is None else torch.float32
        y: Tensor = OPS.scaled_linear(
            rows[0], rows[1], buffers[names.data], buffers[names.scale], self.out_features, self.in_features,
            self.format.name, self.layout, fmt.name, "row", out, family(self.kernel) or "",
        )  # fmt: skip
        return y if self.bias is None else (y + self.bias.float()).to(dtype)

    def extra_repr(self) -> str:
        end = "gathered" if self.gather else "kept"
        wire = f", x gathered: {self.wire.reason}" if self.rows_of_x else ""
        return f"{super().extra_repr()}, rank {self.group.rank} of {self.group.size}, output {end}{wire}"


def reads(layer: Linear, act: Format, rows: int, out_dtype: torch.dtype) -> str:
    """The layout of quantized x that the kernel for so many rows reads without a step between."""
    return layout_read(layer.quantized, act, rows, out_dtype, family(layer.kernel) or "")


def family(kernel: str | None) -> str | None:
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
    """Columns of K on each rank: partial sums (`Numerics.sums`: fp32), added over ranks and rounded once.

    weight: this rank's part, guard columns included. part: what it is of the whole. bias: the whole one.
    scatter: every rank keeps only its share of the rows of the result (their number must divide by the ranks).
    chunks: the rows are worked on in so many pieces, and one piece is added up while the next is multiplied.
    met: a promise that before each call rows gathered in this group arrive (tokens that lie on all ranks between
    layers): large sums through shared memory then begin without waiting for the other ranks.

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
        met: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(weight, bias, **options)
        self.group, self.part, self.scatter, self.chunks, self.met = group, part, scatter, chunks, met
        if self.in_features != part.part_shape[1]:
            raise ShapeError(f"RowParallelLinear: weight {list(weight.shape)} is not the part {part.part_shape}")

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradient(x)
        lead = x.shape[:-1]
        x = add_guards(x.reshape(-1, x.shape[-1]), self.part, self.group)
        y = self.sum_over_ranks(lambda b, e: self._partial(x[b:e]), x.shape[0], x.dtype)
        return y if self.scatter else y.view(*lead, self.out_features)

    def from_quantized(self, q: BlockScaled) -> Tensor:
        """The same for this rank's columns of an x that is quantized already (`swiglu_quantize`), in x's format.

        q: `[rows, k]` in layout "row" -> `[rows, N]` (or this rank's rows) in bf16. Only where no group is cut:
        raises ShapeError otherwise, because a cut group's scale is not known before the ranks agree on it.
        """
        return self.sum_over_ranks(lambda b, e: self.multiply_quantized(rows_of(q, b, e)), q.shape[0], torch.bfloat16)

    def multiply_quantized(self, q: BlockScaled) -> Tensor:
        """This rank's addend for these rows, in the dtype of the numerics' sums."""
        if self.part.front or self.part.back:
            raise ShapeError(f"RowParallelLinear: x comes quantized, but the cut {self.part.cols} needs guard columns")
        buffers, names = self._buffers, self.names
        y: Tensor = OPS.scaled_linear(
            q.data, q.scale, buffers[names.data], buffers[names.scale], self.out_features, self.in_features,
            self.format.name, self.layout, q.format.name, q.layout, self.numerics.sum_dtype,
            family(self.kernel) or "",
        )  # fmt: skip
        return y

    def sum_over_ranks(self, multiply: Callable[[int, int], Tensor], rows: int, dtype: torch.dtype) -> Tensor:
        """The layer's result from `multiply(begin, end)`, which makes this rank's addend for those rows."""
        group, width, sums = self.group, self.out_features, self.numerics.sum_dtype
        if group.takes_turns(rows, width, sums):
            return group.sum_in_turns(
                multiply, rows, width, sums, dtype, bias=self.bias, scatter=self.scatter, met=self.met
            )
        each = max(1, -(-rows // self.chunks))
        bounds = [(b, min(b + each, rows)) for b in range(0, rows, each)] or [(0, 0)]
        started = [self.start(multiply(b, e), dtype) for b, e in bounds]
        parts = [finish() for finish in started]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def start(self, y: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Start to add up an addend; what is returned waits for the sum, which is rounded once."""
        begin = self.group.start_scattered_sum if self.scatter else self.group.start_sum
        return begin(y, dtype, self.bias)

    def _partial(self, x: Tensor) -> Tensor:
        buffers, names = self._buffers, self.names
        y: Tensor = OPS.partial_linear(
            x, buffers[names.data], buffers[names.scale], buffers[names.global_scale], buffers[names.input_scale],
            self.out_features, self.in_features, self.format.name, self.layout, self._policy, self.kernel or "",
        )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        cut = f", {len(self.part.cut)} activation groups cut" if self.part.cut else ""
        b, e = self.part.cols
        return f"{super().extra_repr()}, columns {b} … {e}, rank {self.group.rank} of {self.group.size}{cut}"


def rows_of(q: BlockScaled, begin: int, end: int) -> BlockScaled:
    """Some rows of a quantized `[rows, K]` in which a scale serves one row."""
    if (begin, end) == (0, q.shape[0]):
        return q
    q = convert(q, "row")
    data = q.data.view(torch.uint8)[begin:end].view(q.data.dtype)
    return BlockScaled.trusted(data, q.scale[begin:end], q.format, "row", (end - begin, q.shape[1]))


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
