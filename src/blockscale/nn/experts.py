"""Mixture-of-experts layers on stored bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks, gradients, reference
from ..errors import DtypeError, ShapeError
from ..numerics import Numerics
from ..tensor import BlockScaled
from .linear import Names, WeightModule

_NAMES = Names()


class StackedLinear(WeightModule):
    """One linear for each of E experts; a row of x meets one of them.

    weight: `[E, N, K]`, any format. The other arguments are `Linear`'s.

    forward: `x: [T, K]` sorted by expert, `offsets: int32 [E]` (the end row of each expert's slice) -> `[T, N]` in
    x's dtype; rows past the last offset come out as zero. Experts without rows are not read. Raises what
    `grouped_linear` raises.
    """

    op = "grouped_linear"
    dims = 3

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        buffers, names = self._buffers, self.names
        data = buffers[names.data]
        assert data is not None
        checks.grouped(x.shape, self.shape, offsets)
        checks.operands("grouped_linear", x, data, self.shape)
        checks.where("grouped_linear", x, offsets)
        return gradients.grouped_linear(
            x, data, buffers[names.scale], buffers[names.global_scale], buffers[names.input_scale],
            offsets, self.out_features, self.in_features, self.format.name, self.layout, self._policy,
            self.kernel or "",
        )  # fmt: skip


class BlockDiagonalLinear(StackedLinear):
    """Group g of the input meets matrix g: DeepSeek-V4's grouped output projection (`wo_a`).

    weight: `[G, N, K]`; on disk it is `[G * N, K]`.

    forward: `x: [..., G, K]` -> `[..., G, N]`. Raises ShapeError for other groups or another K.
    """

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        groups, n, k = self.shape
        if x.shape[-2:] != (groups, k):
            raise ShapeError(f"BlockDiagonalLinear: needs x [..., {groups}, {k}], got {list(x.shape)}")
        flat = x.reshape(-1, groups, k)
        tokens = flat.shape[0]
        ends = torch.arange(tokens, tokens * groups + 1, max(tokens, 1), dtype=torch.int32, device=x.device)[:groups]
        y = super().forward(flat.transpose(0, 1).reshape(-1, k), ends)
        return y.reshape(groups, tokens, n).transpose(0, 1).reshape(*x.shape[:-1], n)


class Experts(nn.Module):
    """Routed SwiGLU experts: the router's output in, hidden states out. Needs no transformers.

    gate_up: one weight `[E, 2 I, K]` (gate rows first), or the pair (gate, up) of `[E, I, K]` when the two do not
    share whole blocks (I not a multiple of the block's rows) or have second-level scales of their own (NVFP4).
    down: `[E, K, I]`. Formats may differ.
    limit: DeepSeek-V4's clamp, gate <= limit and |up| <= limit; None for none.
    weigh_first: apply the routing weight before the second matrix (DeepSeek-V4's own order, so that it takes part in
    the quantization of its activations) instead of after it.
    guards: columns of `down` that are no part of I (`parallel.piece`).

    forward: `x: [T, K]`, `index: [T, k]` experts of each token (outside 0 … E - 1: no expert), `weights: [T, k]` ->
    `[T, K]` in x's dtype, the k contributions summed in fp32.

    Raises ShapeError for weights, or indices and weights of tokens, that do not belong together, DtypeError for
    indices that are no int32 or int64.
    Source: DeepSeek-V3 report, section 2.1.2; the inference code released with DeepSeek-V4 for limit and order.
    """

    def __init__(
        self,
        gate_up: BlockScaled | tuple[BlockScaled, BlockScaled],
        down: BlockScaled,
        *,
        limit: float | None = None,
        weigh_first: bool = False,
        guards: int = 0,
        numerics: str | Numerics = "checkpoint",
        kernel: str | None = None,
        names: Names = _NAMES,
    ) -> None:
        super().__init__()
        fused = isinstance(gate_up, BlockScaled)
        parts: dict[str, BlockScaled] = (
            {"gate_up": gate_up} if isinstance(gate_up, BlockScaled) else {"gate": gate_up[0], "up": gate_up[1]}
        )
        for name, weight in (*parts.items(), ("down", down)):
            self.add_module(name, StackedLinear(weight, numerics=numerics, kernel=kernel, names=names))
        experts, hidden, inner = down.shape[0], down.shape[1], down.shape[2] - guards
        want = (experts, 2 * inner if fused else inner, hidden)
        for name, weight in parts.items():
            if weight.shape != want:
                raise ShapeError(
                    f"Experts: {name} {list(weight.shape)} and down {list(down.shape)} need "
                    f"[E, {'2 I' if fused else 'I'}, K] and [E, K, I] with the same E, I and K"
                )
        self.num_experts, self.limit, self.weigh_first = experts, limit, weigh_first

    gate_up: StackedLinear
    gate: StackedLinear
    up: StackedLinear
    down: StackedLinear

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if x.dim() != 2 or index.dim() != 2 or index.shape != weights.shape or index.shape[0] != x.shape[0]:
            got = f"{list(x.shape)}, {list(index.shape)} and {list(weights.shape)}"
            raise ShapeError(f"Experts: needs x [T, K], index [T, k] and weights [T, k], got {got}")
        if index.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"Experts: index needs int32 or int64, got {index.dtype}")
        chosen = torch.where(index < 0, self.num_experts, index).flatten()
        weights = weights.flatten().masked_fill(chosen >= self.num_experts, 0.0)  # NaN too: no expert adds nothing
        order = chosen.argsort(stable=True)
        chosen, token, weight = chosen[order], order // index.shape[1], weights[order].float()
        everyone = torch.arange(self.num_experts, device=x.device, dtype=chosen.dtype)
        offsets = torch.searchsorted(chosen, everyone, right=True).int()
        rows = x[token]
        if "gate_up" in self._modules:
            gate_up = self.gate_up(rows, offsets)
        else:
            gate_up = torch.cat([self.gate(rows, offsets), self.up(rows, offsets)], -1)
        hidden = reference.swiglu(gate_up, self.limit, weight if self.weigh_first else None)
        y = self.down(hidden, offsets).float()
        if not self.weigh_first:
            y = y * weight[:, None]
        parts = torch.empty_like(y)
        parts[order] = y
        return parts.view(*index.shape, y.shape[-1]).sum(1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"limit={self.limit}, weigh_first={self.weigh_first}"
