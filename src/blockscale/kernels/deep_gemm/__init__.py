"""DeepGEMM (optional import) as one more kernel: its fp8_gemm_nt on sm_90.

`matmul` only: fp8_gemm_nt adds no bias and rounds to bfloat16, so a `linear` with a bias would be rounded twice.
Source of the operand contract: DeepGEMM's README (column-major fp32 activation scales, 16-byte aligned columns).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...layouts import convert, decode_scale, scale_view
from ...platform import Platform
from ...registry import Problem
from ...tensor import BlockScaled


class Matmul:
    """accumulation_error: as for every kernel on Hopper's fp8 tensor cores, see kernels/gluon."""

    name, op, layout, priority, m_range = "deep_gemm.fp8_gemm_nt", "matmul", "row", 45, (1, None)
    accumulation_error = 2.0**-10

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        if platform.capability != 90:
            yield f"this adapter knows the contract for sm_90 only, not for {platform.arch or platform.kind}"
        if not platform.has("deep_gemm"):
            yield "the package deep_gemm is not installed"
        fmt, act = problem.format, problem.x_format
        if fmt is None or fmt.element.name != "fp8" or fmt.block != (128, 128):
            yield f"weights are {fmt}, needs fp8 in blocks of 128x128"
        if act is None or act.element.name != "fp8" or act.block != (1, 128):
            yield f"activations are {act}, needs fp8 in groups of 1x128"
        if problem.k % 128:
            yield f"K={problem.k} is not a multiple of 128"
        if problem.n % 8:
            yield f"N={problem.n} is not a multiple of 8: rows of the result start at multiples of 16 bytes"
        if problem.out_dtype != torch.bfloat16:
            yield f"out is {problem.out_dtype}, needs bfloat16"

    def run(self, problem: Problem, x: BlockScaled, w: BlockScaled) -> Tensor:
        import deep_gemm

        if x.layout == "tma":
            x_scale = scale_view(x)
        else:
            row = convert(x, "row")
            rows = row.shape[0]
            x_scale = decode_scale(row.scale)
            columns = x_scale.new_zeros(x_scale.shape[1], -(-rows // 4) * 4)
            columns[:, :rows] = x_scale.mT
            x_scale = columns.mT[:rows]
        y = torch.empty(x.shape[0], w.shape[0], device=x.device, dtype=problem.out_dtype)
        deep_gemm.fp8_gemm_nt((x.data, x_scale), (w.data, decode_scale(w.scale)), y, disable_ue8m0_cast=True)
        return y


KERNELS = [Matmul()]
