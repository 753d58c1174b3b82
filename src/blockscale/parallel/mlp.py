"""A gated MLP over ranks whose tokens lie on all of them, with the traffic behind the multiplications."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .linear import ColumnParallelLinear, RowParallelLinear


class ParallelMLP(nn.Module):
    """`down(silu(gate) * up)`: gate and up cut along N in one fused part, down along K.

    gate_up: with `rows_of_x`, its part `[2 i, K]` gate rows first. down: with `scatter`, no activation group cut.
    chunks: the tokens go through in so many pieces; while one is multiplied, the next arrives and the last leaves.

    forward: `x: [t, K]` bf16, this rank's tokens (the same number on every rank, a multiple of `chunks`) -> `[t, K]`.
    Between ranks travel FP8 bytes and scales on the way in (`ColumnParallelLinear.wire`), fp32 sums on the way out.
    """

    def __init__(self, gate_up: ColumnParallelLinear, down: RowParallelLinear, *, chunks: int = 1) -> None:
        super().__init__()
        self.gate_up, self.down, self.chunks = gate_up, down, chunks
        act = down.numerics.activation_format(down.format)
        assert act is not None, "weight-only numerics have nothing to fuse: use the two layers"
        self._act = act

    def forward(self, x: Tensor) -> Tensor:
        sent = [self.gate_up.start_gather(part) for part in x.chunk(self.chunks)]
        sums = [self._multiply(part, x.dtype) for part in sent]
        return self.down.finish(sums, x.dtype)

    def _multiply(self, sent: list[Tensor], dtype: torch.dtype) -> Tensor:
        hidden = ops.swiglu_quantize(
            self.gate_up.finish_gather(sent, dtype), self._act.name, scale_rounding=self._act.scale_rounding,
            floor=self.down.numerics.act_floor,
        )  # fmt: skip
        return self.down.start_quantized(hidden)

    def extra_repr(self) -> str:
        return f"{self.chunks} chunks"
