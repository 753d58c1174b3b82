"""The ops' fake implementations: shapes and dtypes of the results, for compilers and fake tensors.

Each takes its op's arguments (`library`). Indices into `args` are places in the op's schema.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .formats import get_format
from .layouts import get_layout
from .tensor import BlockScaled

Parts = tuple[Tensor, Tensor, Tensor]
"""data, scale, global_scale (empty where the format has none)."""


def linear(x: Tensor, *args: object) -> Tensor:
    n = args[5]
    return x.new_empty(*x.shape[:-1], cast(int, n))


def gathered_linear(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*args[4].shape, args[5])


def linear_input_grad(grad: Tensor, *args: object) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], cast(int, args[6]))


def matmul(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape[0], cast(int, args[7]), dtype=cast(torch.dtype, args[11]))


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def quantize(
    x: Tensor, scale: Tensor | None, format: str, layout: str, scale_rounding: str, floor: float, kernel: str
) -> Parts:
    return _parts(x, x.shape[-1], format, layout)


def swiglu_quantize(
    gate_up: Tensor, limit: float | None, routing_weight: Tensor | None,
    format: str, layout: str, scale_rounding: str, floor: float, kernel: str,
) -> Parts:  # fmt: skip
    return _parts(gate_up, gate_up.shape[-1] // 2, format, layout)


def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, format: str, layout: str, scale_rounding: str, floor: float, kernel: str
) -> Parts:
    return _parts(x, x.shape[-1], format, layout)


def _parts(x: Tensor, cols: int, format: str, layout: str) -> Parts:
    fmt, (*lead, rows, _) = get_format(format), x.shape
    data = x.new_empty(*lead, *fmt.data_shape(rows, cols), dtype=fmt.element.dtype)
    scale = x.new_empty(*lead, *fmt.scale_shape(rows, cols), dtype=fmt.scale_dtype)
    level = x.new_empty(lead if fmt.two_level else (*lead, 0), dtype=torch.float32)
    q = BlockScaled.trusted(data, scale, fmt, "row", (*lead, rows, cols))
    packed = get_layout(layout).pack(q)  # plain torch, so it runs on fake tensors too
    return packed.data, packed.scale, level
