"""A gated MLP over ranks whose tokens lie on all of them, with the traffic behind the multiplications."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..tensor import BlockScaled
from .collectives import Arriving
from .linear import ColumnParallelLinear, RowParallelLinear, family, reads, rows_of


class ParallelMLP(nn.Module):
    """`down(silu(gate) * up)`: gate and up cut along N in one fused part, down along K.

    gate_up: with `rows_of_x`, its part `[2 i, K]` gate rows first. down: with `scatter`, no activation group cut.
    chunks: the tokens go through in so many pieces; while one is multiplied, the next arrives and the last leaves.
    A `DirectGroup` needs none: this rank's tokens are multiplied while the others' arrive, and the others' sums leave
    while this rank's are multiplied.
    norm: `(weight [K], eps)` of an RMSNorm before the layer; each rank then normalises its own tokens only, in the
    pass that quantizes them.

    forward: `x: [t, K]` bf16, this rank's tokens (the same number on every rank, a multiple of `chunks`) -> `[t, K]`.
    Between ranks travel FP8 bytes and scales on the way in (`ColumnParallelLinear.wire`), partial sums on the way out.
    """

    def __init__(
        self,
        gate_up: ColumnParallelLinear,
        down: RowParallelLinear,
        *,
        chunks: int = 1,
        norm: tuple[Tensor, float] | None = None,
    ) -> None:
        super().__init__()
        self.gate_up, self.down, self.chunks, self.norm = gate_up, down, chunks, norm
        act = down.numerics.activation_format(down.format)
        assert act is not None, "weight-only numerics have nothing to fuse: use the two layers"
        self._act = act

    def forward(self, x: Tensor) -> Tensor:
        group, down = self.down.group, self.down
        rows = group.size * x.shape[0]
        if group.takes_turns(rows, down.out_features, down.numerics.sum_dtype):
            return self._in_turns(x, rows)
        started = [self._send(part) for part in x.chunk(self.chunks)]
        sums = [down.start(down.multiply_quantized(self._hidden(sent.whole(), x.dtype)), x.dtype) for sent in started]
        parts = [finish() for finish in sums]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _in_turns(self, x: Tensor, rows: int) -> Tensor:
        group, down, here = self.down.group, self.down, x.shape[0]
        layout = reads(down, self._act, here, down.numerics.sum_dtype)
        sent, start = self._send(x), group.rank * here
        hidden: dict[tuple[int, int], BlockScaled] = {}
        for b, e in reversed(group.regions(rows, down.out_features, down.numerics.sum_dtype, x.dtype)):
            mine = start <= b and e <= start + here  # these need not have arrived
            part = [t[b - start : e - start] for t in sent.of(group.rank)] if mine else [t[b:e] for t in sent.whole()]
            hidden[b, e] = self._hidden(part, x.dtype, layout)

        def multiply(begin: int, end: int) -> Tensor:
            b, e = next((b, e) for b, e in hidden if b <= begin and end <= e)
            return down.multiply_quantized(rows_of(hidden[b, e], begin - b, end - b))

        return down.sum_over_ranks(multiply, rows, x.dtype)

    def _send(self, x: Tensor) -> Arriving:
        fmt = self.gate_up.wire.format
        if self.norm is None:
            return self.gate_up.start_gather(x)
        assert fmt is not None, "norm: needs activations that travel quantized"
        q = ops.rmsnorm_quantize(
            x, *self.norm, fmt.name, scale_rounding=fmt.scale_rounding, floor=self.gate_up.numerics.act_floor,
            kernel=family(self.gate_up.kernel),
        )  # fmt: skip
        return self.gate_up.send_quantized(q)

    def _hidden(self, rows: list[Tensor], dtype: torch.dtype, layout: str = "row") -> BlockScaled:
        return ops.swiglu_quantize(
            self.gate_up.multiply_sent(rows, dtype), self._act.name, scale_rounding=self._act.scale_rounding,
            floor=self.down.numerics.act_floor, layout=layout,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.chunks} chunks"
