"""The fast paths of ordinary processors: a native library (`cpu.native`) and, without a compiler, torch (`cpu.slices`).

The native kernels read weights as the checkpoint stores them, one byte each, and are exact but for the order of fp32
sums. Their library is optional (`setup.py`); whether it is there is the platform's feature "cpu-native".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ... import reference
from ...formats import Format
from ...layouts import convert
from ...platform import Platform
from ...registry import Problem
from ...tensor import BlockScaled
from . import native, slices

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _common(problem: Problem, platform: Platform) -> Iterator[str]:
    if platform.kind != "cpu":
        yield f"runs on cpu, not on {platform.kind}"
    for what, dtype in {"x": problem.x_dtype, "out": problem.out_dtype}.items():
        if dtype not in _FLOATS:
            yield f"{what} is {dtype}, needs float32, bfloat16 or float16"


def _native(platform: Platform) -> Iterator[str]:
    if platform.kind == "cpu" and not platform.has("cpu-native"):
        yield "the native library is not built: install a C++ compiler (g++) and reinstall blockscale"


def _weight(fmt: Format | None) -> Iterator[str]:
    """What `native/linear.h` cannot read: a vector's elements must share scales evenly."""
    if fmt is None or fmt.element.name not in native.ELEMENTS:
        yield f"reads E4M3, E5M2 and FP4 weights, not {fmt}"
    elif (cols := fmt.block[1]) is not None and cols % 64 and cols not in (4, 8, 16, 32):
        yield f"block is {cols} columns wide, needs 4, 8, 16, 32 or a multiple of 64"


def _activation(fmt: Format | None) -> Iterator[str]:
    if fmt is not None and (fmt.packed or fmt.element.name not in native.ELEMENTS):
        yield f"quantizes x to E4M3 or E5M2, not to {fmt}"


class Slices:
    """FP8 linear in plain torch: decode a few hundred rows exactly, `torch.mm`, repeat. Needs no compiler."""

    name, op = "cpu.slices", "linear"
    layout = "row"
    priority = 30
    m_range = (1, None)

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from _common(problem, platform)
        if problem.format is None or problem.format.packed:
            yield f"reads FP8 weights, not {problem.format}"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        return slices.linear(x, w, bias, problem.numerics, problem.out_dtype)


class _Multiply:
    """FP8, MXFP4 or NVFP4 weights, decoded in registers (M <= 4) or in cache; activations quantized as asked."""

    name = "cpu.native"
    layout = "row"
    priority = 60
    m_range = (1, None)

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from _common(problem, platform)
        yield from _native(platform)
        yield from _weight(problem.format)
        yield from _activation(problem.activation_format)


class Linear(_Multiply):
    """One weight."""

    op = "linear"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        return native.linear(problem, x, w, bias)

    def bind(self, problem: Problem) -> Callable[..., Tensor]:
        """`run` of one problem, from the parts of x and w: see `native.bind_linear`."""
        return native.bind_linear(problem)


class Int16Linear(Linear):
    """Prefill in 16-bit fixed point: weights in steps of 1/32, x in steps of 1/8191 of the largest of its 128 columns.

    accumulation_error: a step's half for each x and each w, added up in the worst way for x whose largest of 128 is
    at most eight times their mean: 8 / 16382, and for weights of mean magnitude 32 and more (a block's largest is
    448): 2^-6 / 32. What ordinary operands show is 1e-4 to 3e-4 of a row's norm. A NaN or an infinity in x makes its
    row NaN.
    """

    name = "cpu.int16"
    priority = 62
    m_range = (8, None)
    accumulation_error = 2.0**-10

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        if not problem.numerics.int16:
            yield "multiplies in 16-bit fixed point (error 3e-4), which the numerics do not allow: they need int16=True"
        yield from super().why_not(problem, platform)
        isa, activation = platform.value("cpu-native"), problem.activation_format
        if isa in ("sse2", "neon", "generic"):
            yield f"needs AVX2 or AVX-512, the native library uses {isa}"
        if isa == "avx512bf16" and (activation is not None or problem.x_dtype == torch.bfloat16):
            yield "cpu.native multiplies in bf16 here, which is as fast and exact"
        if problem.format is not None and problem.format.element.name != "fp8":
            yield f"reads E4M3 weights, not {problem.format}"
        for what, fmt in {"w": problem.format, "x": activation}.items():
            if fmt is not None and (cols := fmt.block[1]) is not None and cols % 128:
                yield f"{what} has blocks {cols} columns wide, needs a multiple of 128"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        return native.linear(problem, x, w, bias, "int16")

    def bind(self, problem: Problem) -> Callable[..., Tensor]:
        return native.bind_linear(problem, "int16")


class GroupedLinear(_Multiply):
    """Experts, one after the other: only those that have rows are read."""

    op = "grouped_linear"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, offsets: Tensor) -> Tensor:
        return native.grouped_linear(problem, x, w, offsets)


class Quantize:
    """FP8 with any block, byte for byte the reference's."""

    name, op = "cpu.native", "quantize"
    layout = "any"
    priority = 60
    m_range = (1, None)

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from _common(problem, platform)
        yield from _native(platform)
        if problem.format is None or problem.format.element.name not in ("fp8", "fp8e5m2"):
            yield f"quantizes to E4M3 and E5M2, not to {problem.format}"

    def run(self, problem: Problem, x: Tensor, scale: Tensor | None, floor: float) -> BlockScaled:
        return convert(native.quantize(problem, x, scale, floor), problem.layout)


class SwigluQuantize(Quantize):
    """`silu(gate) * up` in torch, whose exponential no other code matches to the bit, then the native quantize."""

    op = "swiglu_quantize"

    def run(  # type: ignore[override]
        self, problem: Problem, gate_up: Tensor, limit: float | None, routing_weight: Tensor | None, floor: float
    ) -> BlockScaled:
        h = reference.swiglu(gate_up, limit, routing_weight)
        return convert(native.quantize(problem, h, None, floor), problem.layout)


class RmsnormQuantize(Quantize):
    """The norm in torch, as defined, then the native quantize."""

    op = "rmsnorm_quantize"

    def run(  # type: ignore[override]
        self, problem: Problem, x: Tensor, weight: Tensor, eps: float, floor: float
    ) -> BlockScaled:
        return convert(native.quantize(problem, reference.rmsnorm(x, weight, eps), None, floor), problem.layout)


class DenseLinear:
    """Unquantized weights and a few rows of x: lm_head and routers while decoding."""

    name, op = "cpu.native", "dense_linear"
    layout = "any"
    priority = 60
    m_range = (1, 4)

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from _common(problem, platform)
        yield from _native(platform)
        if problem.w_dtype not in _FLOATS:
            yield f"weight is {problem.w_dtype}, needs float32, bfloat16 or float16"

    def run(self, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return native.dense_linear(problem, x, weight, bias)


KERNELS = [
    Int16Linear(),
    Linear(),
    Slices(),
    GroupedLinear(),
    Quantize(),
    SwigluQuantize(),
    RmsnormQuantize(),
    DenseLinear(),
]
