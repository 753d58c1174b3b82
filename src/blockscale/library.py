"""The torch.library boundary: where tracing stops and kernels are picked.

torch.compile sees one opaque op with a fake implementation, so a compiler that cannot handle fp8 never meets it.
Schemas hold tensors, ints, floats and strings only; the container is rebuilt behind the boundary. The plan of a call
is memoised by everything but M, so a warm call costs a few dictionary look-ups.

`Library.impl` and not `torch.library.custom_op`, which costs twice as much a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from . import checks, fakes, reference, registry
from .errors import ShapeError
from .fakes import Parts
from .formats import Format, ScaleRounding, get_format
from .numerics import get_numerics
from .observe import calls, span, watched
from .registry import Kernel, Plan, Problem
from .tensor import BlockScaled

_LIBRARY = torch.library.Library("blockscale", "DEF")  # type: ignore[no-untyped-call]
_WEIGHT = "Tensor data, Tensor scale, Tensor? global_scale, Tensor? input_scale"
_HOW = "int n, int k, str format, str layout, str numerics, str kernel"
_RESULT = "str format, str layout, str scale_rounding, float floor, str kernel) -> (Tensor, Tensor, Tensor)"
_SCHEMAS = {
    "linear": f"(Tensor x, {_WEIGHT}, Tensor? bias, {_HOW}) -> Tensor",
    "grouped_linear": f"(Tensor x, {_WEIGHT}, Tensor offsets, {_HOW}) -> Tensor",
    "masked_linear": f"(Tensor x, {_WEIGHT}, Tensor counts, {_HOW}) -> Tensor",
    "gathered_linear": f"(Tensor x, {_WEIGHT}, Tensor ids, {_HOW}) -> Tensor",
    "linear_input_grad": f"(Tensor grad, {_WEIGHT}, Tensor? offsets, {_HOW}) -> Tensor",
    "matmul": "(Tensor x, Tensor x_scale, Tensor? x_global_scale, Tensor data, Tensor scale, Tensor? global_scale, "
    "str x_format, str x_layout, int n, int k, str format, str layout, ScalarType out_dtype, str kernel) -> Tensor",
    "dense_linear": "(Tensor x, Tensor weight, Tensor? bias, str kernel) -> Tensor",
    "quantize": f"(Tensor x, Tensor? scale, {_RESULT}",
    "swiglu_quantize": f"(Tensor gate_up, float? limit, Tensor? routing_weight, {_RESULT}",
    "rmsnorm_quantize": f"(Tensor x, Tensor weight, float eps, {_RESULT}",
}


# -- what a call binds: problem and plan, found once -------------------------------------------------------------


@cache
def bind_weight(
    op: str, x_dtype: torch.dtype, device: torch.device, groups: int, static: bool,
    n: int, k: int, format: str, layout: str, numerics: str, kernel: str,
) -> tuple[Problem, Plan, Format]:  # fmt: skip
    fmt = get_format(format)
    problem = Problem(op, n, k, x_dtype, fmt, layout, x_dtype, get_numerics(numerics), groups, static)
    return problem, registry.plan_for(problem, device, kernel=kernel or None, repack=False), fmt


@cache
def _bind_result(
    op: str, x_dtype: torch.dtype, device: torch.device, cols: int, static: bool,
    format: str, layout: str, scale_rounding: str, kernel: str,
) -> tuple[Problem, Plan]:  # fmt: skip
    rounding = cast(ScaleRounding, scale_rounding) if scale_rounding else None
    fmt = get_format(format)
    problem = Problem(op, 0, cols, x_dtype, fmt, layout, x_dtype, static=static, scale_rounding=rounding)
    return problem, registry.plan_for(problem, device, kernel=kernel or None)


@cache
def _bind_dense(
    x_dtype: torch.dtype, w_dtype: torch.dtype, device: torch.device, n: int, k: int, kernel: str
) -> tuple[Problem, Plan]:
    problem = Problem("dense_linear", n, k, x_dtype, None, out_dtype=x_dtype, w_dtype=w_dtype)
    return problem, registry.plan_for(problem, device, kernel=kernel or None, repack=False)


@cache
def _bind_matmul(
    x_dtype: torch.dtype, device: torch.device, x_format: str, x_layout: str,
    n: int, k: int, format: str, layout: str, out_dtype: torch.dtype, kernel: str,
) -> tuple[Problem, Plan]:  # fmt: skip
    fmt, x_fmt = get_format(format), get_format(x_format)
    problem = Problem("matmul", n, k, x_dtype, fmt, layout, out_dtype, x_format=x_fmt, x_layout=x_layout)
    return problem, registry.plan_for(problem, device, kernel=kernel or None, repack=False)


registry.on_change += [f.cache_clear for f in (bind_weight, _bind_result, _bind_dense, _bind_matmul)]


def call(chosen: Kernel, problem: Problem, m: int, *args: object) -> Any:
    """Call the kernel, counted, and under its name in a profile while one is taken."""
    calls[chosen.name] += 1
    if not watched():
        return chosen.run(problem, *args)
    with span(problem.op, m, problem.n, problem.k, chosen.name):
        return chosen.run(problem, *args)


# -- implementations ---------------------------------------------------------------------------------------------


def _other_k(x: Tensor, k: int) -> ShapeError:
    """Modules come here without a check of their own, and a kernel would read past the end of x."""
    return ShapeError(f"x {list(x.shape)} meets a weight of K={k}: need x [..., {k}]")


def _linear(
    x: Tensor, data: Tensor, scale: Tensor, global_scale: Tensor | None, input_scale: Tensor | None,
    bias: Tensor | None, n: int, k: int, format: str, layout: str, numerics: str, kernel: str,
) -> Tensor:  # fmt: skip
    static = input_scale is not None
    problem, plan, fmt = bind_weight("linear", x.dtype, x.device, 0, static, n, k, format, layout, numerics, kernel)
    if x.shape[-1] != k:
        raise _other_k(x, k)
    flat = x if x.dim() == 2 else x.reshape(-1, k)
    m = flat.shape[0]
    if m == 0:
        return x.new_empty(*x.shape[:-1], n)
    w = BlockScaled.trusted(data, scale, fmt, layout, (n, k), global_scale, input_scale)
    y: Tensor = call(plan.pick(m), problem, m, flat, w, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


_CHECKS = {
    "grouped_linear": checks.grouped,
    "masked_linear": checks.masked,
    "gathered_linear": checks.gathered,
}


def _experts(
    op: str, x: Tensor, data: Tensor, scale: Tensor, global_scale: Tensor | None, input_scale: Tensor | None,
    where: Tensor, n: int, k: int, format: str, layout: str, numerics: str, kernel: str,
) -> Tensor:  # fmt: skip
    """`where` says which expert has which row. Checked here, since anyone may call an op, and a kernel would read past
    the end of x or of `where`."""
    _CHECKS[op](x.shape, (scale.shape[0], n, k), where)
    checks.where(op, x, where)
    return run_experts(op, x, data, scale, global_scale, input_scale, where, n, k, format, layout, numerics, kernel)


def run_experts(
    op: str, x: Tensor, data: Tensor, scale: Tensor, global_scale: Tensor | None, input_scale: Tensor | None,
    where: Tensor, n: int, k: int, format: str, layout: str, numerics: str, kernel: str,
) -> Tensor:  # fmt: skip
    """An op for experts, whose operands have been checked."""
    experts, static = scale.shape[0], input_scale is not None
    problem, plan, fmt = bind_weight(op, x.dtype, x.device, experts, static, n, k, format, layout, numerics, kernel)
    w = BlockScaled.trusted(data, scale, fmt, layout, (experts, n, k), global_scale, input_scale)
    shape = where.shape if op == "gathered_linear" else x.shape[:-1]
    rows = math.prod(shape)
    if rows == 0:
        return x.new_empty(*shape, n)
    if where.dtype == torch.int64 and op != "gathered_linear":  # kernels take the low 32 bits
        where = where.clamp(0, x.shape[-2])
    return cast(Tensor, call(plan.pick(rows), problem, rows, x, w, where))


def _matmul(
    x: Tensor, x_scale: Tensor, x_global_scale: Tensor | None, data: Tensor, scale: Tensor, global_scale: Tensor | None,
    x_format: str, x_layout: str, n: int, k: int, format: str, layout: str, out_dtype: torch.dtype, kernel: str,
) -> Tensor:  # fmt: skip
    problem, plan = _bind_matmul(x.dtype, x.device, x_format, x_layout, n, k, format, layout, out_dtype, kernel)
    m = x.shape[0]
    if m == 0:
        return data.new_empty(0, n, dtype=out_dtype)
    left = BlockScaled.trusted(x, x_scale, get_format(x_format), x_layout, (m, k), x_global_scale)
    w = BlockScaled.trusted(data, scale, get_format(format), layout, (n, k), global_scale)
    return cast(Tensor, call(plan.pick(m), problem, m, left, w))


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
    n, k = weight.shape
    problem, plan = _bind_dense(x.dtype, weight.dtype, x.device, n, k, kernel)
    if x.shape[-1] != k:
        raise _other_k(x, k)
    flat = x if x.dim() == 2 else x.reshape(-1, k)
    if not len(flat):
        return x.new_empty(*x.shape[:-1], n)
    y: Tensor = call(plan.pick(flat.shape[0]), problem, flat.shape[0], flat, weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def _linear_input_grad(
    grad: Tensor, data: Tensor, scale: Tensor, global_scale: Tensor | None, input_scale: Tensor | None,
    offsets: Tensor | None, n: int, k: int, format: str, layout: str, numerics: str, kernel: str,
) -> Tensor:  # fmt: skip
    """`grad: [..., N] @ dequantized(w): [N, K]`, straight through the quantization of x."""
    lead = () if offsets is None else (offsets.shape[0],)
    w = BlockScaled.trusted(data, scale, get_format(format), layout, (*lead, n, k), global_scale, input_scale)
    if offsets is None:
        return grad @ reference.dequantize(w, grad.dtype)
    out = grad.new_zeros(grad.shape[0], k)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            out[start:end] = grad[start:end] @ reference.dequantize(w[expert], grad.dtype)
        start = max(start, end)
    return out


def _quantize(
    x: Tensor, scale: Tensor | None, format: str, layout: str, scale_rounding: str, floor: float, kernel: str
) -> Parts:
    problem, plan = _bind_result(
        "quantize", x.dtype, x.device, x.shape[-1], scale is not None, format, layout, scale_rounding, kernel
    )
    if not x.numel():
        return _nothing(fakes.quantize(x, scale, format, layout, scale_rounding, floor, kernel))
    rows, chosen = x.shape[-2], plan.pick(x.shape[-2])
    if x.dim() == 2:
        data, made, level = _parts(call(chosen, problem, rows, x, scale, floor))
        return data, made.clone() if made is scale else made, level  # an op may not return what it was given
    lead = x.shape[:-2]
    scales = None if scale is None else scale.flatten(0, -3)
    matrices = [
        _parts(call(chosen, problem, rows, matrix, None if scales is None else scales[i], floor))
        for i, matrix in enumerate(x.flatten(0, -3))
    ]
    data, scale, level = (_stack(parts, lead) for parts in zip(*matrices, strict=True))
    return data, scale, level


def _swiglu_quantize(
    gate_up: Tensor, limit: float | None, routing_weight: Tensor | None,
    format: str, layout: str, scale_rounding: str, floor: float, kernel: str,
) -> Parts:  # fmt: skip
    cols = gate_up.shape[1] // 2
    problem, plan = _bind_result(
        "swiglu_quantize", gate_up.dtype, gate_up.device, cols, False, format, layout, scale_rounding, kernel
    )
    rows = gate_up.shape[0]
    if not rows:
        how = (format, layout, scale_rounding, floor, kernel)
        return _nothing(fakes.swiglu_quantize(gate_up, limit, routing_weight, *how))
    return _parts(call(plan.pick(rows), problem, rows, gate_up, limit, routing_weight, floor))


def _rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, format: str, layout: str, scale_rounding: str, floor: float, kernel: str
) -> Parts:
    problem, plan = _bind_result(
        "rmsnorm_quantize", x.dtype, x.device, x.shape[1], False, format, layout, scale_rounding, kernel
    )
    if not len(x):
        return _nothing(fakes.rmsnorm_quantize(x, weight, eps, format, layout, scale_rounding, floor, kernel))
    return _parts(call(plan.pick(x.shape[0]), problem, x.shape[0], x, weight, eps, floor))


def _nothing(parts: Parts) -> Parts:
    """Of no rows: there is nothing to ask a kernel for. The global scale is as for zeros."""
    return parts[0], parts[1], parts[2].fill_(1.0)


def _parts(q: BlockScaled) -> Parts:
    level = q.global_scale if q.global_scale is not None else q.data.new_empty(0, dtype=torch.float32)
    return q.data, q.scale, level


def _stack(parts: tuple[Tensor, ...], lead: torch.Size) -> Tensor:
    """Matrices back under their leading dimensions, as bytes where torch cannot stack the dtype."""
    dtype = parts[0].dtype
    stacked = torch.stack([t.view(torch.uint8) if t.element_size() == 1 else t for t in parts])
    return stacked.view(dtype).reshape(*lead, *parts[0].shape)


# -- the ops ------------------------------------------------------------------------------------------------------

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    **{op: partial(_experts, op) for op in _CHECKS},
    "linear_input_grad": _linear_input_grad,
    "matmul": _matmul,
    "dense_linear": _dense_linear,
    "quantize": _quantize,
    "swiglu_quantize": _swiglu_quantize,
    "rmsnorm_quantize": _rmsnorm_quantize,
}
"""What the ops run, by name, for `shortcut`."""

_FAKES = {"grouped_linear": fakes.linear, "masked_linear": fakes.linear}

for _name, _run in IMPLEMENTATIONS.items():
    _LIBRARY.define(_name + _SCHEMAS[_name])  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _fake = _FAKES.get(_name) or getattr(fakes, _name)
    torch.library.register_fake(f"blockscale::{_name}", _fake, lib=_LIBRARY)

OPS = torch.ops.blockscale
"""The ops, as `torch.ops.blockscale`, once their schemas exist."""
