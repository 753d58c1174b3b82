"""Routed experts over ranks: dispatch by all-to-all, compute, combine.

Ranks form `ep` groups of `inner` ranks (`plan`). Group g holds some whole experts; with `inner` > 1 each of its ranks
holds a slice of every one. x and the routing are the same on every rank, as they are between tensor-parallel layers.

**dispatch** (default). Each group takes its share of the tokens and sends every (token, expert) row to the group that
has the expert; numbers of rows differ, and may be zero. The results come back, are weighed and summed where the token
lives, in the order of one device: bit-equal for whole experts. Rows travel as `wire` says.

**reduce**. Every group computes what its experts owe to *all* tokens and the sums are added over ranks in fp32. No
count is exchanged and the host waits for nothing, so it fits a CUDA graph; for few tokens it is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .. import ops, reference
from ..layouts import decode_scale
from ..nn import Experts, StackedLinear
from ..tensor import BlockScaled
from .collectives import Group
from .cuts import Range, shares
from .linear import add_guards, refuse_gradient
from .partial import OPS
from .piece import Piece
from .wire import wire_of

Exchange = Literal["dispatch", "reduce"]


class ParallelExperts(Experts):
    """`nn.Experts` of which every rank holds a part.

    gate_up, down: this rank's part, `[experts here, …]`. outer: ranks with the same slice of other experts.
    inner: ranks with other slices of the same experts. owners: the experts of each group. part: what `down` is of
    the whole matrix. The other arguments are `Experts`'.

    forward: `x: [T, K]`, `index: [T, k]`, `weights: [T, k]`, alike on every rank -> `[T, K]`, alike on every rank.
    """

    def __init__(
        self,
        gate_up: BlockScaled | tuple[BlockScaled, BlockScaled],
        down: BlockScaled,
        *,
        outer: Group,
        inner: Group,
        owners: tuple[Range, ...],
        part: Piece,
        exchange: Exchange = "dispatch",
        **options: Any,
    ) -> None:
        super().__init__(gate_up, down, guards=part.front + part.back, **options)
        self.outer, self.inner, self.owners, self.part, self.exchange = outer, inner, owners, part, exchange
        first = self.gate_up if "gate_up" in self._modules else self.gate
        static = first.quantized.input_scale is not None
        self.wire = wire_of(first.format, first.numerics, static, again=True)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        refuse_gradient(x)
        if self.exchange == "reduce" or self.outer.size == 1:
            return self._reduce(x, index, weights)
        tokens = shares(x.shape[0], self.outer.size)
        begin, end = tokens[self.outer.rank]
        y = self._dispatch(x[begin:end], index[begin:end], weights[begin:end].float())
        return self.outer.gather_rows(y.to(x.dtype), [e - b for b, e in tokens])

    # -- one way: tokens travel to their experts -------------------------------------------------------------------

    def _dispatch(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Contributions to these tokens: `[t, K]` fp32, complete."""
        bounds = torch.tensor([e for _, e in self.owners], device=index.device)
        chosen = torch.where(index < 0, self.owners[-1][1], index).flatten()
        owner = torch.searchsorted(bounds, chosen, right=True)  # one past the last group: no expert at all
        order = owner.argsort(stable=True)
        send = torch.bincount(owner, minlength=self.outer.size + 1)[: self.outer.size]
        receive = self.outer.all_to_all(send, [1] * self.outer.size, [1] * self.outer.size)
        sends, receives = send.tolist(), receive.tolist()
        order = order[: sum(sends)]

        def travel(rows: Tensor) -> Tensor:
            return self.outer.all_to_all(rows, receives, sends)

        rows = self._send_rows(x, order // index.shape[1], travel)
        experts = travel(chosen[order]) - self.owners[self.outer.rank][0]
        weight = travel(weights.flatten()[order]) if self.weigh_first else None
        back = self.outer.all_to_all(self._compute(rows, experts, weight), sends, receives)
        contributions = back.new_zeros(chosen.shape[0], back.shape[1])
        contributions[order] = back
        return self._combine(contributions, weights, x.dtype)

    def _send_rows(self, x: Tensor, token: Tensor, travel: Callable[[Tensor], Tensor]) -> Tensor:
        """The rows at their experts, in x's dtype. With powers of two as scales, dequantizing them is exact."""
        fmt = self.wire.format
        if fmt is None or x.dtype == torch.float16:  # fp16 lacks the exponents of some products
            rows: Tensor = travel(x[token])
            return rows
        floor = self.down.numerics.act_floor
        q = ops.quantize(x, fmt.name, scale_rounding=fmt.scale_rounding, floor=floor)
        data, scale = (travel(t.view(torch.uint8)[token]).view(t.dtype) for t in (q.data, q.scale))
        wide = decode_scale(scale).repeat_interleave(fmt.block[1] or 1, -1)[:, : data.shape[1]]
        return (data.float() * wide).to(x.dtype)

    def _compute(self, x: Tensor, experts: Tensor, weight: Tensor | None) -> Tensor:
        """`x: [R, K]` and the local expert of each row -> `[R, K]`: in x's dtype, or fp32 partial sums."""
        order = experts.argsort(stable=True)
        everyone = torch.arange(self.num_experts, device=x.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts[order], everyone, right=True).int()
        y = self._mlp(x[order], offsets, None if weight is None else weight[order])
        back = torch.empty_like(y)
        back[order] = y
        return back

    def _combine(self, y: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Contributions `[t * k, K]` -> `[t, K]` fp32, summed over experts and then over slices of experts."""
        y = y.float()
        if not self.weigh_first:
            y = y * weights.flatten()[:, None]
        return self.inner.all_reduce(y.view(*weights.shape, y.shape[-1]).sum(1))

    # -- the other way: every group serves all tokens --------------------------------------------------------------

    def _reduce(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        begin, end = self.owners[self.outer.rank]
        chosen = index.flatten()
        here = (chosen >= begin) & (chosen < end)
        local = torch.where(here, chosen - begin, end - begin)  # one past the last: rows that no expert takes
        order = local.argsort(stable=True)
        everyone = torch.arange(self.num_experts, device=x.device, dtype=local.dtype)
        offsets = torch.searchsorted(local[order], everyone, right=True).int()
        token, weight = order // index.shape[1], weights.flatten()[order].float()
        y = self._mlp(x[token], offsets, weight if self.weigh_first else None).float()
        if not self.weigh_first:
            y = y * weight[:, None]
        back = torch.empty_like(y)
        back[order] = y
        total = back.view(*index.shape, y.shape[-1]).sum(1)
        if self.inner.size > 1:
            total = self.outer.sum(total, torch.float32)
        return (self.inner if self.inner.size > 1 else self.outer).sum(total, x.dtype)

    # -- the layer itself ------------------------------------------------------------------------------------------

    def _mlp(self, rows: Tensor, offsets: Tensor, weight: Tensor | None) -> Tensor:
        if "gate_up" in self._modules:
            gate_up = self.gate_up(rows, offsets)
        else:
            gate_up = torch.cat([self.gate(rows, offsets), self.up(rows, offsets)], -1)
        hidden = reference.swiglu(gate_up, self.limit, weight)
        if self.inner.size == 1:
            return cast(Tensor, self.down(hidden, offsets))
        return _partial(self.down, add_guards(hidden, self.part, self.inner), offsets)

    def extra_repr(self) -> str:
        begin, end = self.owners[self.outer.rank]
        where = f"experts {begin} … {end} of {self.owners[-1][1]}, slice {self.inner.rank} of {self.inner.size}"
        return f"{super().extra_repr()}, {where}, {self.exchange}; {self.wire.reason}"


def _partial(layer: StackedLinear, x: Tensor, offsets: Tensor) -> Tensor:
    """`layer(x, offsets)` as fp32, one addend of a sum over ranks."""
    buffers, names = layer._buffers, layer.names
    y: Tensor = OPS.partial_grouped_linear(
        x, buffers[names.data], buffers[names.scale], buffers[names.global_scale], buffers[names.input_scale],
        offsets, layer.out_features, layer.in_features, layer.format.name, layer.layout, layer._policy,
        layer.kernel or "",
    )  # fmt: skip
    return y
