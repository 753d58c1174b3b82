"""Dense multiplications by oneDNN as vllm-xpu-kernels exposes it.

`fp8_gemm` takes A [M, K], B [K, N] (a transposed view is fine) and contiguous scales: layout "col_scales" is exactly
that, so no weight is copied. Its modes are guessed from shapes, and the guesses decide what is done here:

- One column of A's scales means one scale a row and one for each of N columns of B. With blocks, that is K == 128:
  B's scales are repeated to N of them, which is the same thing said in that mode.
- The width of B's blocks is N divided by their number, wrong where N is ragged: scales are repeated to the width
  gcd(N, 128), which must be a multiple of 16. K must be whole blocks.
- The weight-only op makes blocks square, K over the rows of the grid; a grid of one row means one scale a column.

Scales are passed as fp32; E8M0 and BF16 are decoded into a copy. Nothing writes to what the caller holds.
Source: csrc/xpu/onednn/*.h of the package's repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from ... import layouts
from ...formats import Format
from ...numerics import Numerics
from ...platform import Platform
from ...registry import Problem
from ...tensor import BlockScaled
from .contract import call, refusals
from .quantize import GROUP, HALVES, ROW, STATIC, TOLERANCE, quantize

GEMM, GEMM_W8A16, GEMM_FP4 = "_xpu_C::fp8_gemm", "_xpu_C::fp8_gemm_w8a16", "_xpu_C::fp4_gemm"
BLOCK = (128, 128)
_PLAIN = ((1, None), (None, None))
"""Blocks of whole rows and of the whole tensor."""


class _Fp8Gemm:
    layout, m_range = "col_scales", (1, None)
    quantizer_tolerance = TOLERANCE

    def _weight(self, problem: Problem, platform: Platform, *ops: str) -> Iterator[str]:
        yield from refusals(platform, *ops)
        fmt = problem.format
        assert fmt is not None
        if problem.out_dtype not in HALVES:
            yield f"out is {problem.out_dtype}, needs bfloat16 or float16"
        if fmt.element.name != "fp8":
            yield f"multiplies E4M3FN, not {fmt.element.name}"
        if fmt.block not in (BLOCK, *_PLAIN):
            yield f"blocks of {fmt.block}: only 128x128, whole rows and the whole tensor are known to work"

    def _blocks(self, problem: Problem) -> Iterator[str]:
        if problem.format is not None and problem.format.block == BLOCK:
            if problem.k % 128:
                yield f"K={problem.k} is not a multiple of 128: the op would stretch its blocks"
            if problem.k != 128 and gcd(problem.n, 128) % 16:
                yield f"N={problem.n} is ragged: gcd(N, 128) = {gcd(problem.n, 128)} is not a multiple of 16"

    def notes(self, problem: Problem) -> Iterator[str]:
        fmt = problem.format
        if fmt is None or fmt.block != BLOCK:
            return
        if fmt.scale_dtype != torch.float32:
            yield "the weight's scales are decoded to fp32 in each call (stored as fp32, they are not)"
        if problem.k == 128:
            yield "K=128 is one block: the op reads one scale a column then, so the weight's scales are repeated to N"
        elif problem.n % 128:
            width = gcd(problem.n, 128)
            yield f"N={problem.n} is ragged: the weight's scales are repeated to blocks of 128x{width}"


class Linear(_Fp8Gemm):
    """W8A8: x quantized by the package's ops, multiplied by `fp8_gemm`."""

    name, op, priority = "xpu.fp8_gemm", "linear", 70

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        fmt, act = problem.format, problem.activation_format
        assert fmt is not None
        quantizers = (GROUP, STATIC) if fmt.block == BLOCK else (ROW, STATIC)
        yield from self._weight(problem, platform, GEMM, *quantizers)
        yield from self._blocks(problem)
        if problem.x_dtype not in HALVES:
            yield f"x is {problem.x_dtype}, needs bfloat16 or float16"
        yield from _activations(fmt, act)

    def notes(self, problem: Problem) -> Iterator[str]:
        yield "x is copied where it is not contiguous; non-finite elements are taken out before and put back as NaN"
        yield from super().notes(problem)

    def quantize_activations(self, problem: Problem, x: Tensor, w: BlockScaled) -> BlockScaled:
        """x `[M, K]` as `run` multiplies it: what conformance holds to `quantizer_tolerance`."""
        return activations(problem.numerics, problem.activation_format, x, w)

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        q = self.quantize_activations(problem, x, w)
        return fp8_gemm(q, w, bias, problem.out_dtype)


class Matmul(_Fp8Gemm):
    """Both operands quantized: `fp8_gemm` alone."""

    name, op, priority = "xpu.fp8_gemm", "matmul", 70

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from self._weight(problem, platform, GEMM)
        yield from self._blocks(problem)
        assert problem.format is not None
        yield from _activations(problem.format, problem.x_format)
        if problem.x_layout not in ("row", "col_scales", "tma"):
            yield f"x in layout {problem.x_layout!r}, reads row, col_scales and tma"

    def notes(self, problem: Problem) -> Iterator[str]:
        if problem.x_layout != "row":
            yield "the scales of x are copied to row-major: the op reads no strides"
        yield from super().notes(problem)

    def run(self, problem: Problem, x: BlockScaled, w: BlockScaled) -> Tensor:
        return fp8_gemm(x, w, None, problem.out_dtype)


class WeightOnly(_Fp8Gemm):
    """x as it is, by `fp8_gemm_w8a16`."""

    name, op, priority = "xpu.fp8_gemm_w8a16", "linear", 71

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from self._weight(problem, platform, GEMM_W8A16)
        if problem.activation_format is not None:
            yield f"takes activations as they are; {problem.numerics} quantizes them to {problem.activation_format}"
        if problem.x_dtype not in HALVES or problem.x_dtype != problem.out_dtype:
            yield f"x is {problem.x_dtype} and out {problem.out_dtype}: both must be bfloat16 or both float16"
        width = square(problem.n, problem.k)
        if problem.format is not None and problem.format.block == BLOCK and width % 16:
            yield f"N={problem.n}, K={problem.k}: square blocks are {width} wide, needs a multiple of 16"

    def notes(self, problem: Problem) -> Iterator[str]:
        yield "x is copied where it is not contiguous"
        fmt = problem.format
        if fmt is None or fmt.block != BLOCK:
            return
        if fmt.scale_dtype != torch.float32:
            yield "the weight's scales are decoded to fp32 in each call (stored as fp32, they are not)"
        width = square(problem.n, problem.k)
        if width != 128:
            yield f"the weight's scales are repeated to blocks of {width}x{width}, square and dividing N and K"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        n, k = w.shape
        scale = layouts.decode_scale(w.scale)
        if w.format.block == BLOCK:
            width = square(n, k)
            scale = repeated(repeated(scale, 1, width, n), 0, width, k)
        else:
            scale = scale.reshape(-1)
        y: Tensor = call(GEMM_W8A16, x.contiguous(), w.data.mT, scale.contiguous(), bias)
        return y


class Fp4Matmul:
    """MXFP4 times MXFP4 by `fp4_gemm`, whose weight scales are [N, K / 32], not transposed as `fp8_gemm`'s are."""

    name, op, priority, layout, m_range = "xpu.fp4_gemm", "matmul", 71, "row", (1, None)

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from refusals(platform, GEMM_FP4)
        for what, fmt in (("x", problem.x_format), ("the weight", problem.format)):
            if fmt is None or fmt.name != "mxfp4":
                yield f"{what} is {fmt}, needs mxfp4"
        if problem.x_layout != "row":
            yield f"x in layout {problem.x_layout!r}, reads row"
        if problem.out_dtype not in HALVES:
            yield f"out is {problem.out_dtype}, needs bfloat16 or float16"
        if problem.k % 32 or problem.n % 32:
            yield f"N={problem.n}, K={problem.k}: nobody has run the op where 32 does not divide both"

    def run(self, problem: Problem, x: BlockScaled, w: BlockScaled) -> Tensor:
        packed = torch.float4_e2m1fn_x2
        a, b = x.data.contiguous().view(packed), w.data.contiguous().view(packed)
        y: Tensor = call(GEMM_FP4, a, b.mT, *(_e8m0(q.scale) for q in (x, w)), problem.out_dtype, None)
        return y


def fp8_gemm(x: BlockScaled, w: BlockScaled, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x `[M, K]` in any layout with a view of its scales, w `[N, K]` in "col_scales" -> `[M, N]`."""
    n, k = w.shape
    a_scale = layouts.decode_scale(layouts.scale_view(x)).contiguous()
    b_scale = layouts.decode_scale(w.scale)
    if w.format.block == BLOCK:
        b_scale = repeated(b_scale, 1, 1, n).reshape(n) if k == 128 else repeated(b_scale, 1, gcd(n, 128), n)
    else:
        b_scale = b_scale.reshape(-1)
    bias = None if bias is None else bias.to(out_dtype)
    y: Tensor = call(GEMM, x.data.contiguous(), w.data.mT, out_dtype, a_scale, b_scale.contiguous(), bias)
    return y


def repeated(scale: Tensor, dim: int, width: int, size: int) -> Tensor:
    """Scales of blocks of 128 along `dim` of a matrix that is `size` long, as scales of blocks of `width`."""
    if width == 128:
        return scale
    return scale.repeat_interleave(128 // width, dim).narrow(dim, 0, size // width)


def square(n: int, k: int) -> int:
    """Width of the largest square blocks that divide N, K and 128, more than one of them along K."""
    width = gcd(n, k, 128)
    return width // 2 if width == k else width


def activations(numerics: Numerics, fmt: Format | None, x: Tensor, w: BlockScaled) -> BlockScaled:
    """x `[M, K]` in its activation format, with the static scale stored beside `w` where there is one."""
    assert fmt is not None
    static = w.input_scale if fmt.block == (None, None) else None
    return quantize(x, fmt, numerics.act_floor, static)


def _activations(fmt: Format, act: Format | None) -> Iterator[str]:
    want = {BLOCK: (1, 128), (1, None): (1, None), (None, None): (None, None)}.get(fmt.block)
    if act is None:
        yield "multiplies quantized activations, and these are left as they are"
    elif act.element.name != "fp8":
        yield f"activations in {act}, needs E4M3FN"
    elif act.block != want:
        yield f"activations in {act}: weights in blocks of {fmt.block} need groups of {want}"
    elif act.scale_rounding == "pow2_floor":
        yield f"activations in {act}: scales are rounded up to powers of two, not down"


def _e8m0(scale: Tensor) -> Tensor:
    return scale if scale.dtype == torch.float8_e8m0fnu else layouts.encode_e8m0(scale)


KERNELS = [Linear(), Matmul(), WeightOnly(), Fp4Matmul()]
