"""An ordinary linear over `dense_linear`: lm_head, routers and whatever else a checkpoint leaves unquantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import gradients, registry, shortcut
from ..platform import Platform, detect
from ..registry import Plan, Problem


class DenseLinear(nn.Linear):
    """`y = x @ weight.T + bias` with unquantized weights, through the registry's `dense_linear` kernels.

    A decode step reads every weight once, and the largest matrix is often the unquantized lm_head: a kernel made for
    few rows matters as much there as in the quantized layers. It is an `nn.Linear` in all else, so tying, casting and
    state_dict are torch's. Training, and dtypes that differ, take `nn.Linear`'s own path: the op has no gradient.

    forward: `x: [..., K]` -> `[..., N]` in x's dtype.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> DenseLinear:
        """The same parameters (shared, not copied) behind this forward."""
        self = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        return self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # once: a module finds its parameters slowly
        if x.dtype != weight.dtype or gradients.wanted(x, weight, bias) or gradients.has_tangent(x, weight, bias):
            return super().forward(x)
        return shortcut.dense_linear(x, weight, bias, "")

    def plan(self, x_dtype: torch.dtype | None = None, platform: Platform | None = None) -> Plan:
        """Which kernels serve this layer, by M."""
        n, k, dtype = self.out_features, self.in_features, self.weight.dtype
        problem = Problem("dense_linear", n, k, x_dtype or dtype, None, out_dtype=x_dtype or dtype, w_dtype=dtype)
        return registry.select(problem, platform or detect(self.weight.device), repack=False)
