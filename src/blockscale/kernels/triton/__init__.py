"""Portable Triton kernels: native fp8 where the chip has it, integer codec where it has not.

`triton.block` serves every platform that Triton generates code for and every format; `triton.fnuz` is the same for
chips whose matrix instructions take E4M3FNUZ (gfx942). Two variants wait to be ordered: `triton.codec` uses no fp8
type or instruction (what a chip without them gets, for comparison anywhere), `triton.invariant` gives a row the same
bytes whatever batch it is in, and refuses activations whose scale depends on the batch. Triton itself is imported when
a kernel first runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ...platform import Platform, detect
from ...registry import Problem
from ...tensor import BlockScaled
from . import capability, exact

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Triton:
    """What all share: the platforms, and the two switches of the variants."""

    layout = "row"
    m_range = (1, None)
    native = True
    invariant = False

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        if platform.kind not in capability.KINDS:
            yield f"Triton generates code for {', '.join(capability.KINDS)}, not for {platform.kind}"
        if not platform.at_least("triton", "3.4"):
            yield f"needs triton 3.4 or newer, got {platform.value('triton') or 'none'}"
        if 0 < platform.capability < 75:
            yield f"needs sm_75 or newer, got {platform.arch}"
        if problem.x_format is None and problem.x_dtype not in _FLOATS:
            yield f"x is {problem.x_dtype}, needs float32, bfloat16 or float16"
        if problem.out_dtype not in _FLOATS:
            yield f"out is {problem.out_dtype}, needs float32, bfloat16 or float16"
        if problem.format is not None and problem.format.packed and problem.k % 2:
            yield f"K={problem.k} is odd, and FP4 packs two elements in a byte"


class _Multiply(_Triton):
    """accumulation_error: Hopper sums 32 products of fp8 in about 14 bits, truncating, before fp32 takes over at
    every 128 (DeepSeek-V3 report, section 3.3.2); relative to the sum of magnitudes."""

    accumulation_error = 2.0**-10

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        act, w = problem.x_format or problem.activation_format, problem.format
        if act is not None and w is not None:
            for one, other in ((act, w), (w, act)):
                if one.packed and other.block[1] is not None and other.block[1] % 2 and other.block[1] < problem.k:
                    yield f"{other} has odd groups, and {one} packs two elements in a byte"
        if self.layout == "fnuz" and not capability.dot_element(platform, "fp8fnuz"):
            yield f"re-encodes for matrix instructions that take E4M3FNUZ, which {platform.arch or platform.kind} lacks"
        if self.layout == "fnuz" and problem.format is not None and problem.format.element.name != "fp8":
            yield f"re-encodes E4M3FN weights, not {problem.format}"

    def configurations(self, problem: Problem, platform: Platform) -> Iterator[str]:
        """Lines for `explain`: operands that 16 bits hold with their scales."""
        return exact.configurations(problem, platform) if self.layout == "row" else iter(())


class Linear(_Multiply):
    name, op, priority = "triton.block", "linear", 50

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        act = problem.activation_format
        if act is not None and act.block[0] not in (1, None):
            yield f"activations in {act}: a scale must serve one row or all"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        from . import gemm

        return gemm.linear(
            x,
            w,
            bias,
            problem.numerics,
            problem.out_dtype,
            detect(x.device),
            native=self.native,
            invariant=self.invariant,
        )


class GroupedLinear(_Multiply):
    name, op, priority = "triton.block", "grouped_linear", 50
    rows: Literal["sorted", "masked", "pairs"] = "sorted"

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        act = problem.activation_format
        if act is not None and act.block[0] != 1:
            yield f"activations in {act} need a scale over each expert's rows, this computes one for each row or group"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, where: Tensor) -> Tensor:
        from . import grouped

        y = grouped.grouped_linear(
            x.reshape(-1, problem.k), w, where, problem.numerics, problem.out_dtype, detect(x.device), rows=self.rows,
            native=self.native, invariant=self.invariant,
        )  # fmt: skip
        return y if self.rows == "sorted" else y.view(*(where if self.rows == "pairs" else x).shape[:2], -1)


class MaskedLinear(GroupedLinear):
    op, rows = "masked_linear", "masked"


class GatheredLinear(GroupedLinear):
    op, rows = "gathered_linear", "pairs"


class Matmul(_Multiply):
    name, op, priority = "triton.block", "matmul", 50

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        if problem.x_format is not None and problem.x_format.block[0] not in (1, None):
            yield f"x in {problem.x_format}: a scale must serve one row or all"
        layouts = ("fnuz",) if self.layout == "fnuz" else ("row", "col_scales", "tma")
        if problem.x_layout not in layouts:
            yield f"x in layout {problem.x_layout!r}, reads {', '.join(layouts)}"

    def run(self, problem: Problem, x: BlockScaled, w: BlockScaled) -> Tensor:
        from . import gemm

        return gemm.matmul(
            x, w, detect(x.device), out_dtype=problem.out_dtype, native=self.native, invariant=self.invariant
        )


class Quantize(_Triton):
    name, op, priority = "triton.block", "quantize", 50
    layouts = ("row", "col_scales", "tma", "ue8m0x4", "fnuz")
    layout = "any"

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        fmt = problem.format
        assert fmt is not None
        rounding = problem.scale_rounding or fmt.scale_rounding
        if problem.layout not in self.layouts:
            yield f"writes {', '.join(self.layouts)}, not layout {problem.layout!r}"
        if problem.layout == "tma" and fmt.scale_dtype != torch.float32:
            yield f"layout 'tma' holds float32 scales, {fmt} stores {fmt.scale_dtype}"
        if problem.layout == "ue8m0x4" and fmt.scale_dtype != torch.float8_e8m0fnu:
            yield f"layout 'ue8m0x4' holds E8M0 scales, {fmt} stores {fmt.scale_dtype}"
        if problem.layout == "fnuz" and fmt.element.name != "fp8":
            yield f"layout 'fnuz' holds re-encoded E4M3FN, not {fmt}"
        if rounding == "none" and fmt.scale_dtype == torch.float8_e8m0fnu:
            yield f"{fmt} stores powers of two, so its scales need rounding"
        if problem.static and (fmt.packed or problem.layout != "row"):
            yield f"given scales: only 8-bit elements in layout 'row', got {fmt} in {problem.layout!r}"

    def run(self, problem: Problem, x: Tensor, scale: Tensor | None, floor: float) -> BlockScaled:
        from . import quantize

        assert problem.format is not None
        platform = detect(x.device) if self.native else capability.without_fp8(detect(x.device))
        return quantize.quantize(
            x, problem.format, platform, scale=scale, scale_rounding=problem.scale_rounding, floor=floor,
            layout=problem.layout,
        )  # fmt: skip


class _FusedQuantize(Quantize):
    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        if problem.format is not None and (not capability.is_grouped(problem.format) or problem.format.two_level):
            yield f"fuses with formats whose scale serves part of a row, not {problem.format}"


class SwigluQuantize(_FusedQuantize):
    op = "swiglu_quantize"

    def run(  # type: ignore[override]
        self, problem: Problem, gate_up: Tensor, limit: float | None, routing_weight: Tensor | None, floor: float
    ) -> BlockScaled:
        from . import quantize

        assert problem.format is not None
        return quantize.swiglu_quantize(
            gate_up, problem.format, detect(gate_up.device), limit=limit, routing_weight=routing_weight,
            scale_rounding=problem.scale_rounding, floor=floor, layout=problem.layout,
        )  # fmt: skip


class RmsnormQuantize(_FusedQuantize):
    op = "rmsnorm_quantize"

    def run(  # type: ignore[override]
        self, problem: Problem, x: Tensor, weight: Tensor, eps: float, floor: float
    ) -> BlockScaled:
        from . import quantize

        assert problem.format is not None
        return quantize.rmsnorm_quantize(
            x, weight, eps, problem.format, detect(x.device), scale_rounding=problem.scale_rounding, floor=floor,
            layout=problem.layout,
        )  # fmt: skip


class FnuzLinear(Linear):
    name, priority, layout = "triton.fnuz", 52, "fnuz"


class FnuzGroupedLinear(GroupedLinear):
    name, priority, layout = "triton.fnuz", 52, "fnuz"


class FnuzMaskedLinear(MaskedLinear):
    name, priority, layout = "triton.fnuz", 52, "fnuz"


class FnuzGatheredLinear(GatheredLinear):
    name, priority, layout = "triton.fnuz", 52, "fnuz"


class FnuzMatmul(Matmul):
    name, priority, layout = "triton.fnuz", 52, "fnuz"


class CodecLinear(Linear):
    name, priority, native, accumulation_error = "triton.codec", 46, False, 0.0


class CodecGroupedLinear(GroupedLinear):
    name, priority, native, accumulation_error = "triton.codec", 46, False, 0.0


class CodecMaskedLinear(MaskedLinear):
    name, priority, native, accumulation_error = "triton.codec", 46, False, 0.0


class CodecGatheredLinear(GatheredLinear):
    name, priority, native, accumulation_error = "triton.codec", 46, False, 0.0


class CodecMatmul(Matmul):
    name, priority, native, accumulation_error = "triton.codec", 46, False, 0.0


class CodecQuantize(Quantize):
    name, priority, native = "triton.codec", 46, False


class _Invariant(_Multiply):
    name, priority, invariant = "triton.invariant", 44, True

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        act = None if problem.op == "matmul" else problem.activation_format
        if act is not None and (act.two_level or act.block[0] is None) and not problem.static:
            yield f"activations in {act}: their scale depends on the batch"


class InvariantLinear(_Invariant, Linear):
    pass


class InvariantGroupedLinear(_Invariant, GroupedLinear):
    pass


class InvariantMaskedLinear(_Invariant, MaskedLinear):
    pass


class InvariantGatheredLinear(_Invariant, GatheredLinear):
    pass


class InvariantMatmul(_Invariant, Matmul):
    pass


KERNELS = [
    Linear(), GroupedLinear(), MaskedLinear(), GatheredLinear(), Matmul(),
    Quantize(), SwigluQuantize(), RmsnormQuantize(),
    FnuzLinear(), FnuzGroupedLinear(), FnuzMaskedLinear(), FnuzGatheredLinear(), FnuzMatmul(),
    CodecLinear(), CodecGroupedLinear(), CodecMaskedLinear(), CodecGatheredLinear(), CodecMatmul(), CodecQuantize(),
    InvariantLinear(), InvariantGroupedLinear(), InvariantMaskedLinear(), InvariantGatheredLinear(), InvariantMatmul(),
]  # fmt: skip
