"""Constexprs and strides of the quantize kernels: pure functions, remembered where eager calls ask them again."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

from torch import Tensor

from ...formats import Format, ScaleRounding
from ...platform import Platform
from . import capability


def computed(fmt: Format, rounding: ScaleRounding, layout: str, platform: Platform) -> dict[str, Any]:
    """The constexprs that say what is computed, the same for all quantize kernels; the caller's to change."""
    return dict(_computed(fmt, rounding, layout, platform))


@cache
def _computed(fmt: Format, rounding: ScaleRounding, layout: str, platform: Platform) -> dict[str, Any]:
    native = capability.native_cast(platform, fmt.element.name)
    out = "fnuz" if layout == "fnuz" else "native" if native else "codec"
    kind = "float" if layout == "fnuz" else capability.scale_kind(fmt, fmt.scale_dtype)
    return {
        "ELEMENT": fmt.element.name, "LIMIT": fmt.max, "ROUNDING": rounding,
        "MAX_EXPONENT": fmt.element.max_exponent, "SCALE_KIND": kind, "OUT": out,
    }  # fmt: skip


def division(platform: Platform, floor: float, x: Tensor | None = None, fmt: Format | None = None) -> str:
    """How kernels divide (`quantize_parts`); x, fmt: what `divide_groups` divides, for the fastest of the three."""
    return _division(platform, floor, x is not None and x.element_size() == 2, fmt)


@cache
def _division(platform: Platform, floor: float, short: bool, fmt: Format | None) -> str:
    """short: x has at most 11 bits of significand.

    Markstein's division needs scales far above underflow: a floor of 2^-70 makes them at least 2^-79. "rcp" needs
    scales whose significand is not all ones: no number of at most 11 bits over a format's max has one, and a floor
    is looked at.
    """
    if not capability.fused_multiply_add(platform) or floor < 2.0**-70:
        return "ieee"
    if platform.kind != "cuda" or not short or fmt is None:
        return "fma"
    scale = ctypes.c_float(ctypes.c_float(floor).value / fmt.max).value
    return "fma" if math.frexp(scale)[0] == 1 - 2.0**-24 else "rcp"


def scale_strides(scales: Tensor, layout: str) -> tuple[int, int, bool]:
    """(stride of rows, stride of groups, packed by four), in elements of what is stored."""
    if layout in ("col_scales", "tma", "ue8m0x4"):
        return 1, scales.shape[1], layout == "ue8m0x4"
    return scales.shape[1], 1, False


def padded(fmt: Format, rows: int, cols: int, layout: str) -> tuple[int, int]:
    """Rows and groups of the scale grid with the zero padding that the layout asks for."""
    gr, gc = fmt.scale_shape(rows, cols)
    if layout not in ("tma", "ue8m0x4"):
        return gr, gc
    return -(-gr // 4) * 4, -(-gc // 4) * 4 if layout == "ue8m0x4" else gc
