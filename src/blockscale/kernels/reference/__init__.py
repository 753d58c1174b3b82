"""The reference as kernels: dequantize and multiply in torch. Runs everywhere, tried last, and says so by its name.

It computes in fp32 where the definition sums in fp64, so that it runs on devices without fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ... import reference, routed
from ...layouts import convert
from ...platform import Platform, detect
from ...registry import Problem
from ...tensor import BlockScaled

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Reference:
    layout = "any"
    priority = 0
    m_range = (1, None)

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        dtypes = {"out": problem.out_dtype} if problem.x_format else {"x": problem.x_dtype, "out": problem.out_dtype}
        for what, dtype in dtypes.items():
            if dtype not in _FLOATS:
                yield f"{what} is {dtype}, needs float32, bfloat16 or float16"


class _Multiply(_Reference):
    def notes(self, problem: Problem) -> Iterator[str]:
        yield "dequantizes the weights that it meets to fp32 in each call: right everywhere, fast nowhere"
        if problem.activation_format is not None and problem.activation_format.two_level:
            yield (
                "NVFP4 activations have a faster kernel only in Triton, none on a CPU; "
                "16-bit ones have (numerics 'weight_only', or 'checkpoint,nvfp4_act=None' for NVFP4 weights alone)"
            )


class Linear(_Multiply):
    name, op = "reference.linear", "linear"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        y = reference.linear(x, w, bias, numerics=problem.numerics, compute=torch.float32)
        return y.to(problem.out_dtype)


class GroupedLinear(_Multiply):
    name, op = "reference.grouped_linear", "grouped_linear"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, offsets: Tensor) -> Tensor:
        y = reference.grouped_linear(x, w, offsets, numerics=problem.numerics, compute=torch.float32)
        return y.to(problem.out_dtype)


class MaskedLinear(_Multiply):
    name, op = "reference.masked_linear", "masked_linear"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, counts: Tensor) -> Tensor:
        y = routed.masked_linear(x, w, counts, numerics=problem.numerics, compute=torch.float32)
        return y.to(problem.out_dtype)


class GatheredLinear(_Multiply):
    name, op = "reference.gathered_linear", "gathered_linear"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, ids: Tensor) -> Tensor:
        y = routed.gathered_linear(x, w, ids, numerics=problem.numerics, compute=torch.float32)
        return y.to(problem.out_dtype)


class Matmul(_Multiply):
    name, op = "reference.matmul", "matmul"

    def run(self, problem: Problem, x: BlockScaled, w: BlockScaled) -> Tensor:
        return reference.matmul(x, w, problem.out_dtype, compute=torch.float32)


class Quantize(_Reference):
    name, op = "reference.quantize", "quantize"

    def run(self, problem: Problem, x: Tensor, scale: Tensor | None, floor: float) -> BlockScaled:
        assert problem.format is not None
        q = reference.quantize(x, problem.format, scale=scale, scale_rounding=problem.scale_rounding, floor=floor)
        return convert(q, problem.layout)


class SwigluQuantize(_Reference):
    name, op = "reference.swiglu_quantize", "swiglu_quantize"

    def run(
        self, problem: Problem, gate_up: Tensor, limit: float | None, routing_weight: Tensor | None, floor: float
    ) -> BlockScaled:
        h = reference.swiglu(gate_up, limit, routing_weight)
        return Quantize().run(replace(problem, op="quantize"), h, None, floor)


class RmsnormQuantize(_Reference):
    name, op = "reference.rmsnorm_quantize", "rmsnorm_quantize"

    def run(self, problem: Problem, x: Tensor, weight: Tensor, eps: float, floor: float) -> BlockScaled:
        h = reference.rmsnorm(x, weight, eps)
        return Quantize().run(replace(problem, op="quantize"), h, None, floor)


class DenseLinear(_Reference):
    name, op = "reference.dense_linear", "dense_linear"

    def run(self, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype != torch.float32 and detect(x.device).kind == "cuda":
            # By default torch lets cuBLAS add the partial sums of a split K in x's 16 bits; a result in fp32 does not.
            # Only CUDA has this form of mm: elsewhere `linear` sums in fp32 as it is.
            y = torch.mm(x, weight.mT, out_dtype=torch.float32)
            return (y if bias is None else y + bias).to(problem.out_dtype)
        return torch.nn.functional.linear(x, weight, bias).to(problem.out_dtype)


KERNELS = [
    Linear(), GroupedLinear(), MaskedLinear(), GatheredLinear(), Matmul(), Quantize(), SwigluQuantize(),
    RmsnormQuantize(), DenseLinear(),
]  # fmt: skip
