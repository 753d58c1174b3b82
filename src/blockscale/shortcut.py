"""Plain eager calls, past torch's dispatcher and past everything that the last call with the same weight found out.

A small layer's time is that of its call. Where nobody listens at the dispatcher, calls go to the op's implementation;
`linear` also keeps the problem and its plan beside the weight (`Bound`), so that a warm call compares a few identities
and starts the kernel. Every other call takes the op, and both compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter
from torch.overrides import has_torch_function

from . import library, registry
from .formats import Format
from .numerics import Numerics
from .observe import calls, watched
from .registry import Kernel, Problem
from .tensor import BlockScaled

Call = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int], Tensor]
"""(x: [..., K], the weight's data, scale, global_scale, input_scale, bias, M) -> [..., N]."""


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_compiling, _dispatch_modes = torch.compiler.is_compiling, _C._len_torch_dispatch_stack
_transforms, _tracing = _C._functorch.peek_interpreter_stack, _C._is_tracing


def unheard(x: Tensor, weight: Tensor) -> bool:
    """Whether the dispatcher would only hand these plain tensors on: nothing compiles, traces, profiles, transforms,
    intercepts or carries tangents, and there is data to compute with.

    torch (2.11 to 2.13) has public questions for compilers and for function modes. It has none for dispatch modes,
    functorch's transforms, levels of forward-mode derivatives and the profiler, and the public `torch.jit.is_tracing`
    costs as much as all others together; tests/test_ops.py and test_gradients.py hold each of the private ones to what
    it must notice.
    """
    return (
        type(x) is Tensor
        and (type(weight) is Tensor or type(weight) is Parameter)
        and not _compiling()  # first, since a compiler cannot follow the questions below
        and not x.is_meta
        and not watched()
        and not has_torch_function((x,))  # a plain tensor has none, so this asks about modes
        and not _dispatch_modes()
        and _transforms() is None
        and forward_ad._current_level < 0
        and not _tracing()
    )


def experts(op: str, x: Tensor, data: Tensor, *rest: Any) -> Tensor:
    """One of the ops for experts, whose operands the caller has checked: `checks.where`, and `grouped` or its like."""
    if unheard(x, data):
        return library.run_experts(op, x, data, *rest)
    return cast(Tensor, getattr(library.OPS, op)(x, data, *rest))


_dense_linear = library.IMPLEMENTATIONS["dense_linear"]


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
    """`OPS.dense_linear`."""
    return cast(Tensor, (_dense_linear if unheard(x, weight) else library.OPS.dense_linear)(x, weight, bias, kernel))


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` may go through a `Bound`: nobody listens, and no gradient is asked for."""
    return unheard(x, weight) and not x.requires_grad and (bias is None or not bias.requires_grad)


def again(
    bound: Bound | None, x: Tensor, data: Tensor, scale: Tensor, level: Tensor | None, static: Tensor | None,
    bias: Tensor | None, numerics: object, kernel: str | None,
) -> Tensor | None:  # fmt: skip
    """`linear` by what an earlier call with this weight found; None where it must be found anew, or something is wrong.

    The questions of `plain`, and whether `bound` answers this call: written out, since each function call in between
    costs as much as a question.
    """
    if (
        _compiling()
        or bound is None
        or type(x) is not Tensor
        or (type(data) is not Tensor and type(data) is not Parameter)
        or profiler._is_profiler_enabled
        or has_torch_function((x,))
        or _dispatch_modes()
        or _transforms() is not None
        or forward_ad._current_level >= 0
        or _tracing()
        or x.requires_grad
    ):
        return None
    device, shape = x.device, x.shape
    if (
        bound.x_dtype is not x.dtype
        or bound.numerics is not numerics
        or bound.kernel is not kernel
        or bound.age != registry.age
        or bound.device != device
        or data.device != device
        or (static is not None) is not bound.static
        or not shape
        or shape[-1] != bound.k
        or (bias is not None and not bound.adds(bias))
    ):
        return None
    m = shape[0] if len(shape) == 2 else x.numel() // bound.k
    if not m:
        return None
    for m_max, name, call in bound.spans:
        if m_max is None or m <= m_max:
            calls[name] += 1
            return call(x, data, scale, level, static, bias, m)
    return None


class Bound:
    """The problem of a weight and of x's dtype, and what runs it by M. It holds no tensors.

    Kept beside a weight (`BlockScaled.bound`, `nn.Linear`) until a call comes that it does not fit, or the set of
    kernels changes. A copy or a pickle of what holds it holds None instead.
    """

    def __init__(self, x: Tensor, w: BlockScaled, numerics: str | Numerics, kernel: str | None) -> None:
        self.age, self.x_dtype, self.device = registry.age, x.dtype, x.device
        self.numerics, self.kernel = numerics, kernel
        self.n, self.k = w.shape
        self.static = w.input_scale is not None
        problem, plan, fmt = library.bind_weight(
            "linear", x.dtype, x.device, 0, self.static, self.n, self.k, w.format.name, w.layout, str(numerics),
            kernel or "",
        )  # fmt: skip
        self.spans = [(span.m_max, span.kernel.name, _call(span.kernel, problem, fmt, w.layout)) for span in plan.spans]

    def adds(self, bias: Tensor) -> bool:
        """Whether nothing is wrong with a bias, and no gradient asked of it."""
        return (
            bias.dtype in _FLOATS and bias.shape == (self.n,) and bias.device == self.device and not bias.requires_grad
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _call(kernel: Kernel, problem: Problem, fmt: Format, layout: str) -> Call:
    """The kernel's own way to be called again and again, where it has one; else `run`."""
    bind = getattr(kernel, "bind", None)
    if bind is not None:
        return cast(Call, bind(problem))
    n, k, run = problem.n, problem.k, kernel.run

    def call(
        x: Tensor, data: Tensor, scale: Tensor, level: Tensor | None, static: Tensor | None, bias: Tensor | None, m: int
    ) -> Tensor:
        w = BlockScaled.trusted(data, scale, fmt, layout, (n, k), level, static)
        if x.dim() == 2:
            return cast(Tensor, run(problem, x, w, bias))
        return cast(Tensor, run(problem, x.reshape(m, k), w, bias)).view(*x.shape[:-1], n)

    return call
