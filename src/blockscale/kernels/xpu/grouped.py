"""Experts by vllm-xpu-kernels: a CUTLASS grouped GEMM for unquantized activations, a batched one for few rows.

`cutlass_grouped_gemm_interface` takes 16-bit activations only (W8A16, W4A16), rows sorted by expert and int32 counts.
FP8 weights are [E, K, N] with scales [E, K / 128, N / 128] (layout "kn"), MXFP4 weights [E, N, K / 2] with bytes
[E, N, K / 32] (layout "row"). It writes no row behind the last expert's, so the result starts as zeros.

W8A8 has only `fp8_bmm`, which multiplies every expert with the same number of rows: x is spread to [E, T, K], worth
it for the few groups of an attention output projection, not for hundreds of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from ... import layouts
from ...platform import Platform
from ...registry import Problem
from ...tensor import BlockScaled
from .contract import call, refusals
from .multiply import BLOCK, _activations, activations, repeated
from .quantize import GROUP, HALVES, STATIC, TOLERANCE

GROUPED, BMM = "_xpu_C::cutlass_grouped_gemm_interface", "_xpu_C::fp8_bmm"
MAX_GROUPS = 16
"""Up to this many groups a batched multiplication of all of them is worth it."""


class _GroupedGemm:
    op, m_range = "grouped_linear", (1, None)

    def _common(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from refusals(platform, GROUPED)
        if platform.arch == "dg2":
            yield "the package builds its grouped GEMM for Xe2 and newer, not for dg2"
        if problem.activation_format is not None:
            yield f"takes activations as they are; {problem.numerics} quantizes them to {problem.activation_format}"
        if problem.x_dtype not in HALVES or problem.x_dtype != problem.out_dtype:
            yield f"x is {problem.x_dtype} and out {problem.out_dtype}: both must be bfloat16 or both float16"

    def notes(self, problem: Problem) -> Iterator[str]:
        yield "x is copied where it is not contiguous; the result starts as zeros for rows that no expert owns"

    def _run(self, problem: Problem, x: Tensor, data: Tensor, scale: Tensor, offsets: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], problem.n)
        rows = offsets.diff(prepend=offsets.new_zeros(1)).clamp(min=0).to(torch.int32)
        call(GROUPED, x.contiguous(), None, data, scale, None, y, rows, problem.n, problem.k, offsets.shape[0])
        return y


class Fp8Experts(_GroupedGemm):
    name, priority, layout = "xpu.grouped_gemm", 71, "kn"

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from self._common(problem, platform)
        fmt = problem.format
        assert fmt is not None
        if fmt.element.name != "fp8" or fmt.block != BLOCK:
            yield f"reads E4M3FN in blocks of 128x128, not {fmt}"
        elif problem.n % 128 or problem.k % 128:
            yield f"N={problem.n}, K={problem.k}: the op takes whole blocks of 128"

    def notes(self, problem: Problem) -> Iterator[str]:
        yield from super().notes(problem)
        if problem.format is not None and problem.format.scale_dtype != torch.float32:
            yield "the weights' scales are decoded to fp32 in each call (stored as fp32, they are not)"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, offsets: Tensor) -> Tensor:
        return self._run(problem, x, w.data, layouts.decode_scale(w.scale), offsets)


class Mxfp4Experts(_GroupedGemm):
    name, priority, layout = "xpu.grouped_gemm_mxfp4", 72, "row"

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from self._common(problem, platform)
        fmt = problem.format
        assert fmt is not None
        if fmt.name != "mxfp4":
            yield f"reads mxfp4, not {fmt}"
        if problem.k % 32 or problem.n % 32:
            yield f"N={problem.n}, K={problem.k}: nobody has run the op where 32 does not divide both"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, offsets: Tensor) -> Tensor:
        scale = w.scale if w.scale.dtype == torch.float8_e8m0fnu else layouts.encode_e8m0(w.scale)
        return self._run(problem, x, w.data.view(torch.float4_e2m1fn_x2), scale.view(torch.uint8), offsets)


class Batched:
    """W8A8 for few groups and rows, by `fp8_bmm`: DeepSeek-V4's grouped output projection while decoding."""

    name, op, priority, layout, m_range = "xpu.fp8_bmm", "grouped_linear", 70, "row", (1, 256)
    quantizer_tolerance = TOLERANCE

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from refusals(platform, BMM, GROUP, STATIC)
        fmt = problem.format
        assert fmt is not None
        if problem.groups > MAX_GROUPS:
            yield f"multiplies all {problem.groups} groups with as many rows each: only up to {MAX_GROUPS} groups"
        if fmt.element.name != "fp8" or fmt.block != BLOCK:
            yield f"reads E4M3FN in blocks of 128x128, not {fmt}"
        else:
            yield from _activations(fmt, problem.activation_format)
            if problem.k % 128:
                yield f"K={problem.k} is not a multiple of 128: the op would stretch its blocks"
            if gcd(problem.n, 128) % 16:
                yield f"N={problem.n} is ragged: gcd(N, 128) = {gcd(problem.n, 128)} is not a multiple of 16"
        if problem.x_dtype not in HALVES or problem.out_dtype not in HALVES:
            yield f"x is {problem.x_dtype} and out {problem.out_dtype}, need bfloat16 or float16"

    def notes(self, problem: Problem) -> Iterator[str]:
        yield "every group gets a copy of x with zeros for the rows of others, quantized once"
        yield "the weights' scales are transposed (and decoded to fp32 where stored as E8M0) in each call"
        if problem.n % 128:
            yield f"N={problem.n} is ragged: the weights' scales are repeated to blocks of 128x{gcd(problem.n, 128)}"

    def quantize_activations(self, problem: Problem, x: Tensor, w: BlockScaled) -> BlockScaled:
        """x `[T, K]` as `run` multiplies it: what conformance holds to `quantizer_tolerance`."""
        return activations(problem.numerics, problem.activation_format, x, w)

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, offsets: Tensor) -> Tensor:
        q = self.quantize_activations(problem, x, w)
        rows, experts = x.shape[0], offsets.shape[0]
        row = torch.arange(rows, device=x.device)
        owner = torch.searchsorted(offsets, row, right=True)  # experts: nobody
        mine = owner == torch.arange(experts, device=x.device)[:, None]  # [E, T]
        bytes_of_all = q.data.view(torch.uint8).expand(experts, -1, -1)
        data = bytes_of_all.masked_fill(~mine[..., None], 0).view(torch.float8_e4m3fn)
        a_scale = layouts.decode_scale(q.scale).expand(experts, -1, -1).contiguous()
        b_scale = layouts.decode_scale(w.scale.view(torch.uint8).mT.contiguous().view(w.scale.dtype)
                                       if w.scale.element_size() == 1 else w.scale.mT)  # fmt: skip
        b_scale = repeated(b_scale, 2, gcd(problem.n, 128), problem.n).contiguous()
        every: Tensor = call(BMM, data, w.data.mT, problem.out_dtype, a_scale, b_scale, None)
        picked = every[owner.clamp(max=experts - 1), row]
        return picked.masked_fill((owner == experts)[:, None], 0)


KERNELS = [Fp8Experts(), Mxfp4Experts(), Batched()]
