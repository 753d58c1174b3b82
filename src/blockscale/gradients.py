"""Gradients for activations and bias, so that adapters (LoRA) train on a frozen quantized base.

Straight-through: the gradient ignores the rounding of x (Bengio, Léonard, Courville, 2013). Stored bytes have no
gradient; asking for one is an error.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import shortcut
from .errors import BlockscaleError
from .library import OPS


def linear(x: Tensor, *args: Any) -> Tensor:
    """`OPS.linear` that knows its gradient. A graph is built only where one is asked for."""
    if torch.is_grad_enabled() and (x.requires_grad or (args[4] is not None and args[4].requires_grad)):
        return cast(Tensor, _Linear.apply(x, *args))  # type: ignore[no-untyped-call]
    return cast(Tensor, OPS.linear(x, *args))


def grouped_linear(x: Tensor, *args: Any) -> Tensor:
    """`OPS.grouped_linear` that knows its gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _GroupedLinear.apply(x, *args))  # type: ignore[no-untyped-call]
    return shortcut.grouped_linear(x, *args)


def refuse(op: str, *operands: Tensor, instead: str) -> None:
    """Raises BlockscaleError where a gradient of an op that has none is asked for."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        raise BlockscaleError(f"{op} has no gradient: need operands without requires_grad, or {instead}")


def _refuse_weight_gradient(ctx: Any) -> None:
    if any(ctx.needs_input_grad[1:5]):
        raise BlockscaleError(
            "a block-scaled weight has no gradient: its stored bytes are frozen. Need requires_grad=False; "
            "train an adapter beside it, or quantize again after training in BF16"
        )


class _Linear(torch.autograd.Function):
    """Straight-through: the gradient ignores the rounding of x (Bengio et al., 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        _refuse_weight_gradient(ctx)
        ctx.save_for_backward(*args[:4])
        ctx.how = args[5:]
        return cast(Tensor, OPS.linear(x, *args))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = OPS.linear_input_grad(grad, *ctx.saved_tensors, None, *ctx.how) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[5] else None
        return grad_x, None, None, None, None, grad_bias, *(None for _ in ctx.how)


class _GroupedLinear(torch.autograd.Function):
    """The same, expert by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        _refuse_weight_gradient(ctx)
        ctx.save_for_backward(*args[:5])
        ctx.how = args[5:]
        return cast(Tensor, OPS.grouped_linear(x, *args))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = OPS.linear_input_grad(grad, *ctx.saved_tensors, *ctx.how)
        return grad_x, None, None, None, None, None, *(None for _ in ctx.how)
