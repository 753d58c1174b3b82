"""Quantizers of vllm-xpu-kernels behind our definition.

What the ops do that the definition does not, and what is done about it:

- They multiply by 1 / scale and write no scale below 1 / (448 * 512), so bytes can differ from `reference.quantize`:
  declared as `quantizer_tolerance`, which conformance holds them to.
- `eps`, `fp8_min`, `fp8_max` and both `dummy_` flags of the group op are ignored: a floor that it would miss takes
  the way of computed scales; column-major scales come from the strides of the tensor that it writes to.
- A NaN is clamped to 448 and an infinity spoils its group's scale: non-finite elements are taken out before and
  written as NaN after.
- x must be contiguous: copied where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ... import layouts, reference
from ...formats import Format
from ...platform import Platform
from ...registry import Problem, QuantizerTolerance
from ...tensor import BlockScaled
from .contract import SCALE_FLOOR, call, refusals

GROUP, STATIC, ROW, SILU = (
    "_C::per_token_group_fp8_quant", "_C::static_scaled_fp8_quant", "_C::dynamic_per_token_scaled_fp8_quant",
    "_C::silu_and_mul_per_block_quant",
)  # fmt: skip
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HALVES = (torch.bfloat16, torch.float16)
TOLERANCE = QuantizerTolerance(scale_error=2.0**-20, scale_floor=SCALE_FLOOR, codes=1)
EXACT_SCALES = TOLERANCE._replace(scale_error=0.0, scale_floor=0.0)
_NAN = 0x7F


class _Quantize:
    op, layout, m_range = "quantize", "any", (1, None)
    quantizer_tolerance = TOLERANCE
    dtypes: tuple[torch.dtype, ...] = FLOATS
    layouts: tuple[str, ...] = ("row", "col_scales", "tma")

    def _common(self, problem: Problem, platform: Platform, *ops: str) -> Iterator[str]:
        yield from refusals(platform, *ops)
        assert problem.format is not None
        if problem.x_dtype not in self.dtypes:
            yield f"x is {problem.x_dtype}, needs {', '.join(map(str, self.dtypes))}"
        if problem.format.element.name != "fp8":
            yield f"writes E4M3FN, not {problem.format.element.name}"
        if problem.layout not in self.layouts:
            yield f"writes layouts {', '.join(self.layouts)}, not {problem.layout!r}"
        if problem.layout == "tma" and problem.format.scale_dtype != torch.float32:
            yield f"layout 'tma' holds float32 scales, {problem.format} stores {problem.format.scale_dtype}"

    def notes(self, problem: Problem) -> Iterator[str]:
        yield "x is copied where it is not contiguous; non-finite elements are taken out before and put back as NaN"


class GroupQuantize(_Quantize):
    """1xG groups by `per_token_group_fp8_quant`."""

    name, priority = "xpu.group_quantize", 70

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from self._common(problem, platform, GROUP, STATIC)
        fmt = problem.format
        assert fmt is not None
        if fmt.block[0] != 1 or fmt.block[1] is None:
            yield f"quantizes groups of a row, {fmt} has blocks of {fmt.block}"
        elif problem.k % fmt.block[1]:
            yield f"cols={problem.k} is not a multiple of the group of {fmt.block[1]}: the op cuts x into whole groups"
        if problem.static:
            yield "computes its scales, and here they are given"
        yield from _rounding(problem, fmt)

    def notes(self, problem: Problem) -> Iterator[str]:
        yield from super().notes(problem)
        if problem.format is not None and problem.format.scale_dtype != torch.float32:
            yield "scales come as fp32 powers of two and are stored as E8M0 by a copy"

    def run(self, problem: Problem, x: Tensor, scale: Tensor | None, floor: float) -> BlockScaled:
        assert problem.format is not None
        rounding = problem.scale_rounding or problem.format.scale_rounding
        return quantize_groups(
            x, replace(problem.format, scale_rounding=rounding), floor, problem.layout, problem.format
        )


class RowQuantize(_Quantize):
    """One scale a row by `dynamic_per_token_scaled_fp8_quant`."""

    name, priority = "xpu.row_quantize", 71

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from self._common(problem, platform, ROW, STATIC)
        fmt = problem.format
        assert fmt is not None
        if fmt.block != (1, None):
            yield f"quantizes whole rows, {fmt} has blocks of {fmt.block}"
        if (problem.scale_rounding or fmt.scale_rounding) != "none":
            yield "does not round scales to powers of two"
        if problem.static:
            yield "computes its scales, and here they are given"

    def run(self, problem: Problem, x: Tensor, scale: Tensor | None, floor: float) -> BlockScaled:
        assert problem.format is not None
        return layouts.convert(quantize_rows(x, problem.format, floor), problem.layout)


class StaticQuantize(_Quantize):
    """Given scales, and one for the tensor that torch computes, by `static_scaled_fp8_quant`.

    `dynamic_scaled_fp8_quant` has no floor: a tensor of zeros would be multiplied by infinity. It is not used.
    """

    name, priority, layouts = "xpu.static_quantize", 72, ("row",)
    quantizer_tolerance = EXACT_SCALES

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from self._common(problem, platform, STATIC)
        fmt = problem.format
        assert fmt is not None
        if not problem.static and fmt.block != (None, None):
            yield f"takes given scales, or computes one for the tensor; {fmt} has blocks of {fmt.block}"
        if problem.k % (fmt.block[1] or 1):
            yield f"cols={problem.k} is not a multiple of the block's {fmt.block[1]}: the op infers blocks by division"

    def notes(self, problem: Problem) -> Iterator[str]:
        yield from super().notes(problem)
        if problem.format is not None and problem.format.block[0] not in (1, None):
            yield "scales are repeated for every row: the op infers blocks by division, and rows may be ragged"
        if not problem.static:
            yield "the scale is computed by torch: the package's own op has no floor"

    def run(self, problem: Problem, x: Tensor, scale: Tensor | None, floor: float) -> BlockScaled:
        assert problem.format is not None
        if scale is None:
            scale = exact_scales(x, problem.format, floor)
        return with_scales(x, problem.format, scale)


class SwigluQuantize(_Quantize):
    """`silu_and_mul_per_block_quant`. Its scale layout follows its flag, not strides, unlike the group op's."""

    op, name, priority = "swiglu_quantize", "xpu.swiglu_quantize", 70
    dtypes = HALVES
    layouts = ("row", "col_scales")

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from self._common(problem, platform, SILU)
        fmt = problem.format
        assert fmt is not None
        if fmt.block not in ((1, 32), (1, 64), (1, 128)):
            yield f"quantizes groups of 32, 64 or 128, {fmt} has blocks of {fmt.block}"
        elif problem.k % (fmt.block[1] or 1):
            yield f"cols={problem.k} is not a multiple of the group of {fmt.block[1]}"
        yield from _rounding(problem, fmt)

    def notes(self, problem: Problem) -> Iterator[str]:
        yield from super().notes(problem)
        yield "a limit or routing weights are applied to a copy of gate_up first (the weights to up, rounded once)"

    def run(
        self, problem: Problem, gate_up: Tensor, limit: float | None, routing_weight: Tensor | None, floor: float
    ) -> BlockScaled:
        fmt = problem.format
        assert fmt is not None
        assert fmt.block[1] is not None
        rows, cols = gate_up.shape[0], gate_up.shape[1] // 2
        gate, up = gate_up[:, :cols], gate_up[:, cols:]
        broken = ~(gate.isfinite() & up.isfinite())
        gate, up = gate.masked_fill(broken, 0), up.masked_fill(broken, 0)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if routing_weight is not None:
            up = (up.float() * routing_weight.float()[:, None]).to(up.dtype)
        column = problem.layout == "col_scales"
        data = gate_up.new_empty(rows, cols, dtype=torch.float8_e4m3fn)
        grid = (cols // fmt.block[1], rows) if column else (rows, cols // fmt.block[1])
        scale = gate_up.new_empty(grid, dtype=torch.float32)
        rounding = problem.scale_rounding or fmt.scale_rounding
        call(SILU, data, torch.cat([gate, up], 1), scale.mT if column else scale, fmt.block[1], None, column,
             rounding == "pow2_ceil")  # fmt: skip
        data.view(torch.uint8).masked_fill_(broken, _NAN)
        return BlockScaled.trusted(data, _stored(scale, fmt), fmt, problem.layout, (rows, cols))


# -- shared with the multiplications, which quantize their activations the same way ------------------------------


def quantize(x: Tensor, fmt: Format, floor: float, static: Tensor | None = None) -> BlockScaled:
    """Activations `x: [M, K]` in "fp8_1xG", "fp8_row" or "fp8_tensor", layout "row"."""
    if fmt.block == (None, None):
        scale = exact_scales(x, fmt, floor) if static is None else static.reshape(1, 1)
        return with_scales(x, fmt, scale)
    return quantize_rows(x, fmt, floor) if fmt.block[1] is None else quantize_groups(x, fmt, floor, "row", fmt)


def quantize_groups(x: Tensor, fmt: Format, floor: float, layout: str, stored: Format) -> BlockScaled:
    """1xG groups of `x: [rows, cols]`; fmt says how scales are rounded, stored how they are kept."""
    if floor > SCALE_FLOOR * fmt.max:  # the op ignores eps, so it would write smaller scales
        q = with_scales(x, fmt, exact_scales(x, fmt, floor))
        return layouts.convert(replace(q, scale=_stored(q.scale, stored), format=stored), layout)
    group = fmt.block[1]
    assert group is not None
    rows, cols = x.shape
    clean, broken = _finite(x)
    data = x.new_empty(rows, cols, dtype=torch.float8_e4m3fn)
    held, view = _scales(x, rows, cols // group, layout)
    call(GROUP, clean, data, view, group, floor, -fmt.max, fmt.max, fmt.scale_rounding == "pow2_ceil", False, False)
    data.view(torch.uint8).masked_fill_(broken, _NAN)
    return BlockScaled.trusted(data, _stored(held, stored), stored, layout, (rows, cols))


def quantize_rows(x: Tensor, fmt: Format, floor: float) -> BlockScaled:
    """One scale for each row of `x: [rows, cols]`."""
    if floor > SCALE_FLOOR * fmt.max:
        return with_scales(x, fmt, exact_scales(x, fmt, floor))
    clean, broken = _finite(x)
    data = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    call(ROW, data, clean, scale, None)
    data.view(torch.uint8).masked_fill_(broken, _NAN)
    return BlockScaled.trusted(data, scale, fmt, "row", tuple(x.shape))


def with_scales(x: Tensor, fmt: Format, scale: Tensor) -> BlockScaled:
    """`x: [rows, cols]` divided by given scales `[grid rows, grid cols]`, which are kept as they are."""
    rows = x.shape[0]
    clean, broken = _finite(x)
    data = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    factors = layouts.decode_scale(scale)
    if fmt.block[0] not in (1, None):
        factors = factors.repeat_interleave(fmt.block[0], 0)[:rows]
    call(STATIC, data, clean, factors.contiguous(), None)
    data.view(torch.uint8).masked_fill_(broken, _NAN)
    return BlockScaled.trusted(data, scale, fmt, "row", tuple(x.shape))


def exact_scales(x: Tensor, fmt: Format, floor: float) -> Tensor:
    """The definition's dynamic scales, fp32 `[grid rows, grid cols]`, computed by torch."""
    amax = reference.block_amax(reference.to_blocks(x.float(), fmt)).clamp(min=floor)
    return _stored(reference.round_scale(amax, fmt, fmt.scale_rounding), fmt)


def _stored(scale: Tensor, fmt: Format) -> Tensor:
    """fp32 scales as the format keeps them. Powers of two of normal size, so the exponent's bits are the E8M0 byte, to
    the nearest: a device's exp2 may be an ulp short. `layouts.encode_e8m0` would wait for the device to check."""
    if fmt.scale_dtype != torch.float8_e8m0fnu:
        return scale
    return ((scale.contiguous().view(torch.int32) + 0x400000) >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)


def _rounding(problem: Problem, fmt: Format) -> Iterator[str]:
    rounding = problem.scale_rounding or fmt.scale_rounding
    if rounding == "pow2_floor":
        yield "rounds scales up to powers of two, not down"
    if rounding == "none" and fmt.scale_dtype == torch.float8_e8m0fnu:
        yield f"{fmt} stores powers of two, so its scales need rounding"


def _finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """(contiguous x with zeros for what is not finite, where that was)."""
    broken = ~x.isfinite()
    return x.masked_fill(broken, 0).contiguous(), broken


def _scales(x: Tensor, rows: int, groups: int, layout: str) -> tuple[Tensor, Tensor]:
    """(fp32 scales as the layout holds them, the `[rows, groups]` view of them that the op writes through)."""
    if layout == "row":
        held = x.new_empty(rows, groups, dtype=torch.float32)
        return held, held
    if layout == "tma":
        held = x.new_zeros(groups, -(-rows // 4) * 4, dtype=torch.float32)
        return held, held[:, :rows].mT
    held = x.new_empty(groups, rows, dtype=torch.float32)
    return held, held.mT


KERNELS = [GroupQuantize(), RowQuantize(), StaticQuantize(), SwigluQuantize()]
