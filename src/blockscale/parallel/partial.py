"""Three ops that one device never needs: sums that are not finished yet, and x that arrives quantized.

- `partial_linear`, `partial_grouped_linear`: as `linear` and `grouped_linear`, but the result is in fp32 whatever x is,
  because it is one addend of a sum over ranks. Of a linear, in bf16 where the numerics ask for it (`Numerics.sums`).
- `scaled_linear`: x comes as quantized data and scales (over the wire), and is not quantized again.

torch.compile sees them as opaque ops with fake implementations, like those of `library`.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor

from .. import registry
from ..formats import Format, get_format
from ..library import call
from ..numerics import get_numerics
from ..registry import Plan, Problem
from ..tensor import BlockScaled

_LIBRARY = torch.library.Library("blockscale", "FRAGMENT")  # type: ignore[no-untyped-call]
_WEIGHT = "Tensor data, Tensor scale, Tensor? global_scale, Tensor? input_scale"
_HOW = "int n, int k, str format, str layout, str numerics, str kernel"
_SCHEMAS = {
    "partial_linear": f"(Tensor x, {_WEIGHT}, {_HOW}) -> Tensor",
    "partial_grouped_linear": f"(Tensor x, {_WEIGHT}, Tensor offsets, {_HOW}) -> Tensor",
    "scaled_linear": "(Tensor x, Tensor x_scale, Tensor data, Tensor scale, int n, int k, str format, str layout, "
    "str x_format, str x_layout, ScalarType out_dtype, str kernel) -> Tensor",
}


@cache
def _bind(
    op: str, x_dtype: torch.dtype, device: torch.device, groups: int, static: bool,
    n: int, k: int, format: str, layout: str, numerics: str, kernel: str,
) -> tuple[Problem, Plan, Format]:  # fmt: skip
    fmt, policy = get_format(format), get_numerics(numerics)
    out = policy.sum_dtype if op == "linear" else torch.float32
    problem = Problem(op, n, k, x_dtype, fmt, layout, out, policy, groups, static)
    return problem, registry.plan_for(problem, device, kernel=kernel or None, repack=False), fmt


@cache
def _bind_scaled(
    x_dtype: torch.dtype, device: torch.device, n: int, k: int, format: str, layout: str, x_format: str,
    x_layout: str, out_dtype: torch.dtype, kernel: str,
) -> tuple[Problem, Plan, Format]:  # fmt: skip
    fmt = get_format(format)
    problem = Problem("matmul", n, k, x_dtype, fmt, layout, out_dtype, x_format=get_format(x_format), x_layout=x_layout)
    return problem, registry.plan_for(problem, device, kernel=kernel or None, repack=False), fmt


registry.on_change += [_bind.cache_clear, _bind_scaled.cache_clear]


def _partial_linear(
    x: Tensor, data: Tensor, scale: Tensor, global_scale: Tensor | None, input_scale: Tensor | None,
    n: int, k: int, format: str, layout: str, numerics: str, kernel: str,
) -> Tensor:  # fmt: skip
    static = input_scale is not None
    problem, plan, fmt = _bind("linear", x.dtype, x.device, 0, static, n, k, format, layout, numerics, kernel)
    flat = x.reshape(-1, k)
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], n, dtype=problem.out_dtype)
    w = BlockScaled.trusted(data, scale, fmt, layout, (n, k), global_scale, input_scale)
    y: Tensor = call(plan.pick(flat.shape[0]), problem, flat.shape[0], flat, w, None)
    return y.view(*x.shape[:-1], n)


def _partial_grouped_linear(
    x: Tensor, data: Tensor, scale: Tensor, global_scale: Tensor | None, input_scale: Tensor | None,
    offsets: Tensor, n: int, k: int, format: str, layout: str, numerics: str, kernel: str,
) -> Tensor:  # fmt: skip
    experts, static = offsets.shape[0], input_scale is not None
    problem, plan, fmt = _bind(
        "grouped_linear", x.dtype, x.device, experts, static, n, k, format, layout, numerics, kernel
    )
    if x.shape[0] == 0:
        return x.new_empty(0, n, dtype=torch.float32)
    w = BlockScaled.trusted(data, scale, fmt, layout, (experts, n, k), global_scale, input_scale)
    return cast(Tensor, call(plan.pick(x.shape[0]), problem, x.shape[0], x, w, offsets))


def _scaled_linear(
    x: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor, n: int, k: int, format: str, layout: str,
    x_format: str, x_layout: str, out_dtype: torch.dtype, kernel: str,
) -> Tensor:  # fmt: skip
    problem, plan, fmt = _bind_scaled(x.dtype, x.device, n, k, format, layout, x_format, x_layout, out_dtype, kernel)
    if x.shape[0] == 0:
        return x.new_empty(0, n, dtype=out_dtype)
    quantized = BlockScaled.trusted(x, x_scale, get_format(x_format), x_layout, (x.shape[0], k))
    w = BlockScaled.trusted(data, scale, fmt, layout, (n, k))
    return cast(Tensor, call(plan.pick(x.shape[0]), problem, x.shape[0], quantized, w))


def _fake_linear(x: Tensor, *args: object) -> Tensor:
    sums = get_numerics(cast(str, args[8])).sum_dtype
    return x.new_empty(*x.shape[:-1], cast(int, args[4]), dtype=sums)


def _fake_grouped(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape[0], cast(int, args[5]), dtype=torch.float32)


def _fake_scaled(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape[0], cast(int, args[3]), dtype=cast(torch.dtype, args[9]))


def layout_read(weight: BlockScaled, act: Format, rows: int, out_dtype: torch.dtype, kernel: str) -> str:
    """The layout of x, quantized to `act`, that `scaled_linear` reads without a step between."""
    n, k = weight.shape
    x_dtype, names = act.element.dtype, (weight.format.name, weight.layout, act.name)
    _, plan, _ = _bind_scaled(x_dtype, weight.device, n, k, *names, "row", out_dtype, kernel)
    wanted: str = getattr(plan.pick(rows), "x_layout", "row")
    return wanted if act.scale_dtype == torch.float32 else "row"  # the others hold fp32 scales


for _name, _run, _fake in (
    ("partial_linear", _partial_linear, _fake_linear),
    ("partial_grouped_linear", _partial_grouped_linear, _fake_grouped),
    ("scaled_linear", _scaled_linear, _fake_scaled),
):
    _LIBRARY.define(_name + _SCHEMAS[_name])  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"blockscale::{_name}", _fake, lib=_LIBRARY)

OPS = torch.ops.blockscale
"""The ops, once their schemas exist."""
