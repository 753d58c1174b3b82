"""Gradients for activations and bias, so that adapters (LoRA) train on a frozen quantized base.

Straight-through: the gradient ignores the rounding of x (Bengio, Léonard, Courville, 2013). Stored bytes have no
gradient, and nothing here has a forward-mode derivative; asking for either is an error.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import shortcut
from .errors import BlockscaleError
from .library import OPS


def linear(x: Tensor, *args: Any) -> Tensor:
    """`OPS.linear` that knows its gradient. A graph is built only where one is asked for."""
    refuse_tangents("linear", x, args[4])
    if wanted(x, args[4]):
        return cast(Tensor, _StraightThrough.apply(x, *args[:4], None, *args[4:]))  # type: ignore[no-untyped-call]
    return cast(Tensor, OPS.linear(x, *args))


def grouped_linear(x: Tensor, *args: Any) -> Tensor:
    """`OPS.grouped_linear` that knows its gradient; for operands that the caller has checked."""
    refuse_tangents("grouped_linear", x)
    if wanted(x):
        return cast(Tensor, _StraightThrough.apply(x, *args[:5], None, *args[5:]))  # type: ignore[no-untyped-call]
    return shortcut.experts("grouped_linear", x, *args)


def wanted(*operands: Tensor | None) -> bool:
    """Whether a gradient with respect to one of these is asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)


def has_tangent(*operands: Tensor | None) -> bool:
    """Whether one of these carries a tangent: `torch.func.jvp`, `forward_ad`."""
    if forward_ad._current_level < 0:  # torch has no public word for "outside of all", and most calls are
        return False
    unpack: Any = forward_ad.unpack_dual
    return any(t is not None and unpack(t).tangent is not None for t in operands)


def refuse(op: str, *operands: Tensor | None, instead: str) -> None:
    """Raises BlockscaleError where a derivative of an op that has none is asked for."""
    if wanted(*operands):
        raise BlockscaleError(f"{op} has no gradient: need operands without requires_grad, or {instead}")
    refuse_tangents(op, *operands)


def refuse_tangents(op: str, *operands: Tensor | None) -> None:
    """Raises BlockscaleError for operands with tangents, which torch would drop in silence at an op of ours."""
    if has_tangent(*operands):
        raise BlockscaleError(
            f"{op} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): need operands without "
            "tangents; backward() and torch.func.vjp work where there is a gradient"
        )


class _StraightThrough(torch.autograd.Function):
    """x: [..., K] through a stored weight [N, K], or, with offsets, rows of x through the experts of [E, N, K].

    The gradient ignores the rounding of x (Bengio et al., 2013).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, data: Tensor, scale: Tensor, level: Tensor | None, static: Tensor | None,
        offsets: Tensor | None, bias: Tensor | None, *how: Any,
    ) -> Tensor:  # fmt: skip
        if offsets is None:
            return cast(Tensor, OPS.linear(x, data, scale, level, static, bias, *how))
        return cast(Tensor, OPS.grouped_linear(x, data, scale, level, static, offsets, *how))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if any(ctx.needs_input_grad[1:5]):
            raise BlockscaleError(
                "a block-scaled weight has no gradient: its stored bytes are frozen. Need requires_grad=False; "
                "train an adapter beside it, or quantize again after training in BF16"
            )
        ctx.save_for_backward(*inputs[1:6])
        ctx.how = inputs[7:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = _input_grad(grad, *ctx.saved_tensors, *ctx.how) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[6] else None
        return grad_x, None, None, None, None, None, grad_bias, *(None for _ in ctx.how)


def _input_grad(grad: Tensor, *args: Any) -> Tensor:
    """`OPS.linear_input_grad`, in a graph of its own where second derivatives are asked for (`create_graph=True`)."""
    if wanted(grad):
        return cast(Tensor, _InputGrad.apply(grad, *args))  # type: ignore[no-untyped-call]
    return cast(Tensor, OPS.linear_input_grad(grad, *args))


class _InputGrad(torch.autograd.Function):
    """grad: [..., N] times a stored weight [N, K], or the experts' of [E, N, K]: linear in grad.

    So its gradient is the layer without the rounding of x, and has all derivatives that the layer has.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *args: Any) -> Tensor:
        return cast(Tensor, OPS.linear_input_grad(grad, *args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:6])
        ctx.how = inputs[6:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        data, scale, level, _, offsets = ctx.saved_tensors
        n, k, format, layout, *_ = ctx.how
        how = (n, k, format, layout, "weight_only", "")
        if offsets is None:
            grad_grad = linear(grad, data, scale, level, None, None, *how)
        else:
            grad_grad = grouped_linear(grad, data, scale, level, None, offsets, *how)
        return grad_grad, *(None for _ in range(5 + len(ctx.how)))
