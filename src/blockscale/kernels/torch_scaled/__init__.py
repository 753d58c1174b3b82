"""cuBLASLt's block scaling through torch.nn.functional.scaled_mm: Hopper, CUDA 12.9 or newer.

Needs no Triton, so it is what a Hopper machine without Triton gets. Activations are quantized with torch operations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import reference
from ...formats import Format, get_format
from ...layouts import convert, decode_scale
from ...platform import Platform
from ...registry import Problem
from ...tensor import BlockScaled

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _TorchScaled:
    """accumulation_error: as for every kernel on Hopper's fp8 tensor cores, see kernels/gluon."""

    layout = "row"
    priority = 40
    m_range = (1, None)
    accumulation_error = 2.0**-10

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        if platform.capability != 90:
            yield f"cuBLASLt multiplies 128x128 blocks on sm_90 only, not on {platform.arch or platform.kind}"
        if not platform.at_least("cuda", "12.9"):
            yield f"needs CUDA 12.9 or newer, got {platform.value('cuda') or 'none'}"
        if not platform.at_least("torch", "2.10"):
            yield f"needs torch 2.10 or newer for scaled_mm, got {platform.value('torch') or 'none'}"
        fmt = problem.format
        if fmt is None or fmt.element.name != "fp8" or fmt.block != (128, 128):
            yield f"weights are {fmt}, needs fp8 in blocks of 128x128"
        if problem.k % 512:
            yield f"K={problem.k} is not a multiple of 512: rows of weight scales start at multiples of 16 bytes"
        if problem.n % 16:
            yield f"N={problem.n} is not a multiple of 16"
        if problem.out_dtype != torch.bfloat16:
            yield f"out is {problem.out_dtype}, needs bfloat16"

    def _activations(self, act: Format | None) -> Iterator[str]:
        if act is None:
            yield "multiplies quantized activations, and the numerics leave them as they are"
        elif act.element.name != "fp8" or act.block != (1, 128):
            yield f"activations are {act}, needs fp8 in groups of 1x128"


class Linear(_TorchScaled):
    name, op = "torch_scaled.linear", "linear"

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        yield from self._activations(problem.activation_format)
        if problem.x_dtype not in _FLOATS:
            yield f"x is {problem.x_dtype}, needs float32, bfloat16 or float16"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        act = problem.activation_format
        assert act is not None
        rows = x.shape[0]
        q = reference.quantize(F.pad(x, (0, 0, 0, -rows % 4)), act, floor=problem.numerics.act_floor)
        return _scaled_mm(q, w, bias, problem.out_dtype)[:rows]


class Matmul(_TorchScaled):
    name, op = "torch_scaled.matmul", "matmul"

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        yield from self._activations(problem.x_format)

    def run(self, problem: Problem, x: BlockScaled, w: BlockScaled) -> Tensor:
        rows = x.shape[0]
        x = convert(x, "row")
        if rows % 4:
            pad = -rows % 4
            data = F.pad(x.data.view(torch.uint8), (0, 0, 0, pad)).view(x.data.dtype)
            scale = F.pad(decode_scale(x.scale), (0, 0, 0, pad))
            x = BlockScaled(data, scale, get_format("fp8_1x128"))
        return _scaled_mm(x, w, None, problem.out_dtype)[:rows]


def _scaled_mm(x: BlockScaled, w: BlockScaled, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x: fp8_1x128 [M, K] with M % 4 == 0, w: fp8_128x128 [N, K], both in layout "row" -> [M, N]."""
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    x_scale = decode_scale(x.scale).mT.contiguous().mT  # strides (1, M)
    w_scale = decode_scale(w.scale).contiguous().mT
    y: Tensor = scaled_mm(
        x.data, w.data.mT, x_scale, ScalingType.BlockWise1x128, w_scale, ScalingType.BlockWise128x128,
        SwizzleType.NO_SWIZZLE, SwizzleType.NO_SWIZZLE, bias=None if bias is None else bias.to(out_dtype),
        output_dtype=out_dtype,
    )  # fmt: skip
    return y


KERNELS = [Linear(), Matmul()]
