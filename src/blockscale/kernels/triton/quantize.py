"""Launch the quantize kernels: which one, which tile, which memory.

Nothing here waits for the device, and all memory comes from torch's caching allocator, so that every call can be
captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...formats import Format, ScaleRounding
from ...numerics import DEFAULT_FLOOR
from ...platform import Platform
from ...tensor import BlockScaled
from ...tuning import QuantizeTile, quantize_tile
from . import capability
from . import quantize_kernels as kernels
from . import quantize_whole as whole_kernels
from .capability import is_grouped
from .quantize_constants import computed, division, padded, scale_strides

_PARTS = 1024
FEW_ROWS = 16
"""Up to so many rows a program quantizes one group and no more, if it is not one of many short ones."""
_FEW_GROUP = 64
_BYTES = (torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.int32)


def quantize(
    x: Tensor,
    fmt: Format,
    platform: Platform,
    *,
    scale: Tensor | None = None,
    scale_rounding: ScaleRounding | None = None,
    floor: float = DEFAULT_FLOOR,
    layout: str = "row",
    level: Tensor | None = None,
    tickets: Tensor | None = None,
    values: torch.dtype | None = None,
    tile: QuantizeTile | None = None,
) -> BlockScaled:
    """`x: [rows, cols]` in `fmt`, with the bytes of `reference.quantize`, laid out as `layout`.

    scale: a given grid makes it static. level: NVFP4's global scale, if known: a number, or one for each row.
    tickets: int32 that is zeroed on the way, for a split-K multiplication that follows. values: hold codes as values
    of this 16- or 32-bit dtype instead of bytes, for the multiplication that follows and nobody else. The last two:
    formats that `is_grouped` only.
    """
    x = _rows_dense(x)
    rows, cols = x.shape
    rounding = scale_rounding or fmt.scale_rounding
    if scale is not None:
        return _static(x, fmt, scale, platform)
    if is_grouped(fmt):
        if fmt.two_level and level is None:
            level = _nvfp4_level(x, fmt)
        return _groups(
            x, fmt, rounding, floor, layout, platform, cols=cols, level=level, tickets=tickets, values=values, tile=tile
        )
    data, scales = _allocate(x, fmt, rows, cols, layout, platform, zero=layout in ("tma", "ue8m0x4"))
    how = computed(fmt, rounding, layout, platform)
    s_r, s_g, pack4 = scale_strides(scales, layout)
    with on_device(x):
        if fmt.block == (None, None):
            parts = x.new_empty(min(rows, _PARTS), dtype=torch.float32)
            whole_kernels.amax_kernel[(parts.numel(),)](x, parts, rows, cols, x.stride(0), C=1024)
            whole_kernels.tensor_kernel[(-(-cols // 1024) * rows,)](
                x, _codes(data, how), _bytes(scales), parts, parts.numel(), rows, cols, x.stride(0), data.stride(0),
                0, 0, rows, cols, floor, **how, DIVIDE=division(platform, floor), STATIC=False, PARTS=_PARTS, C=1024,
            )  # fmt: skip
        else:
            br, bc = fmt.block_shape(rows, cols)
            chunk_c = min(_pow2(bc), 2048)
            grid = fmt.scale_shape(rows, cols)
            whole_kernels.block_kernel[(grid[1] * grid[0],)](
                x, _codes(data, how), _bytes(scales), rows, cols, br, bc, x.stride(0), data.stride(0), s_r, s_g,
                floor, **how, DIVIDE=division(platform, floor), PACK4=pack4,
                R=min(_pow2(br), max(4096 // chunk_c, 1)), C=chunk_c, **capability.quantize_options(platform, 4),
            )  # fmt: skip
    return BlockScaled.trusted(data, scales, fmt, layout, (rows, cols))


def quantized_values(
    x: Tensor,
    fmt: Format,
    platform: Platform,
    dtype: torch.dtype,
    *,
    floor: float = DEFAULT_FLOOR,
    level: Tensor | None = None,
    tickets: Tensor | None = None,
    shuffled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The numbers that `quantize` would store, code times scale, as `[rows, cols]` of `dtype`, and NVFP4's level, which
    they leave out. Formats that `is_grouped`; the caller knows that the products are exact in dtype.

    shuffled: columns in the order of `tiles.shuffled`; cols in whole 32.
    """
    x = _rows_dense(x)
    if fmt.two_level and level is None:
        level = _nvfp4_level(x, fmt)
    out = "native product" if capability.native_cast(platform, fmt.element.name) else "product"
    held = _groups(
        x, fmt, fmt.scale_rounding, floor, "row", platform, cols=x.shape[1], level=level, tickets=tickets,
        values=dtype, out=out, shuffled=shuffled,
    )  # fmt: skip
    return held.data, level


def swiglu_quantize(
    gate_up: Tensor,
    fmt: Format,
    platform: Platform,
    *,
    limit: float | None = None,
    routing_weight: Tensor | None = None,
    scale_rounding: ScaleRounding | None = None,
    floor: float = DEFAULT_FLOOR,
    layout: str = "row",
    tickets: Tensor | None = None,
) -> BlockScaled:
    """`quantize(reference.swiglu(gate_up, limit, routing_weight))` in one pass: `[T, 2 I]` -> `[T, I]`.

    The exponential may differ from torch's in the last bit, so a code may too where the product lies at a tie.
    """
    gate_up = _rows_dense(gate_up)
    cols = gate_up.shape[1] // 2
    fused = {"limit": limit, "weight": routing_weight}
    rounding = scale_rounding or fmt.scale_rounding
    return _groups(gate_up, fmt, rounding, floor, layout, platform, cols=cols, fused=fused, tickets=tickets)


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    fmt: Format,
    platform: Platform,
    *,
    scale_rounding: ScaleRounding | None = None,
    floor: float = DEFAULT_FLOOR,
    layout: str = "row",
) -> BlockScaled:
    """`quantize(reference.rmsnorm(x, weight, eps))` in one pass: `x: [T, K]`, `weight: [K]`."""
    x = _rows_dense(x)
    rows, cols = x.shape
    data, scales = _allocate(x, fmt, rows, cols, layout, platform)
    how = computed(fmt, scale_rounding or fmt.scale_rounding, layout, platform)
    s_r, s_g, pack4 = scale_strides(scales, layout)
    padded_rows, padded_groups = padded(fmt, rows, cols, layout)
    group = fmt.block[1] or cols
    whole = _pow2(padded_groups) * _pow2(group) <= 16384
    tile = _pow2(padded_groups) if whole else max(2048 // _pow2(group), 1)
    with on_device(x):
        kernels.rmsnorm_kernel[(padded_rows,)](
            x, _codes(data, how), _bytes(scales), weight, rows, cols, -(-cols // group), x.stride(0), data.stride(0),
            s_r, s_g, padded_rows, padded_groups, floor, eps, GROUP=group, **how,
            DIVIDE=division(platform, floor, x, fmt), PACK4=pack4, EVEN=_even(cols, group),
            WHOLE=whole,
            G=tile, C=_pow2(group),
            **capability.quantize_options(platform, 8 if tile * _pow2(group) > 4096 else 4),
        )  # fmt: skip
    return BlockScaled.trusted(data, scales, fmt, layout, (rows, cols))


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return nullcontext() if t.device.type == "cpu" else torch.accelerator.device_index(t.device.index)


def _groups(
    x: Tensor,
    fmt: Format,
    rounding: ScaleRounding,
    floor: float,
    layout: str,
    platform: Platform,
    *,
    cols: int,
    level: Tensor | None = None,
    fused: dict[str, Any] | None = None,
    tickets: Tensor | None = None,
    values: torch.dtype | None = None,
    out: str = "value",
    shuffled: bool = False,
    tile: QuantizeTile | None = None,
) -> BlockScaled:
    rows, group = x.shape[0], fmt.block[1]
    assert group is not None
    how = computed(fmt, rounding, layout, platform)
    if out in ("product", "native product"):
        data = scales = x.new_empty(rows, cols, dtype=values)  # the kernel stores no scale
    else:
        data, scales = _allocate(x, fmt, rows, cols, layout, platform)
    if values is not None:
        data, how["OUT"] = x.new_empty(rows, cols, dtype=values) if out == "value" else data, out
    s_r, s_g, pack4 = scale_strides(scales, layout)
    padded_rows, padded_groups = padded(fmt, rows, cols, layout)
    few = tile is None and rows <= FEW_ROWS
    tile = tile or quantize_tile(
        rows, padded_groups, group, platform, scales_by_column=layout in ("col_scales", "tma", "ue8m0x4")
    )
    limit, weight = (fused["limit"], fused["weight"]) if fused else (None, None)
    divide = division(platform, floor, x, fmt)
    if (
        few
        and group >= _FEW_GROUP
        and not shuffled
        and not fused
        and not fmt.packed
        and not pack4
        and _even(cols, group)
    ):
        with on_device(x):
            kernels.few_kernel[(padded_groups, padded_rows)](
                x, _codes(data, how), _bytes(scales), tickets, 0 if tickets is None else tickets.numel(), rows,
                x.stride(0), data.stride(0), s_r, s_g, floor, **how, DIVIDE=divide,
                TICKETS=0 if tickets is None else 256, C=group, **capability.quantize_options(platform, 1),
            )  # fmt: skip
        return BlockScaled.trusted(data, scales, fmt, layout, (rows, cols), level)
    with on_device(x):
        across, down = -(-padded_groups // tile.groups), -(-padded_rows // tile.rows)
        two_axes = down <= 64
        kernels.group_kernel[(across, down) if two_axes else (across * down,)](
            x, _codes(data, how), _bytes(scales), level, int(level is not None and level.dim() > 0), weight, rows, cols,
            -(-cols // group), x.stride(0), data.stride(0), s_r, s_g, padded_rows, padded_groups, floor,
            0.0 if limit is None else limit, tickets, 0 if tickets is None else tickets.numel(),
            SWIGLU=fused is not None, CLAMP=limit is not None, WEIGHTED=weight is not None, GROUP=group, **how,
            DIVIDE=divide, PACK4=pack4, EVEN=_even(cols, group), SHUFFLED=shuffled,
            TICKETS=0 if tickets is None else 1024, FEW=two_axes, R=tile.rows, G=tile.groups, C=_pow2(group),
            **capability.quantize_options(platform, tile.warps),
        )  # fmt: skip
    return BlockScaled.trusted(data, scales, fmt, layout, (rows, cols), level)


def _static(x: Tensor, fmt: Format, scale: Tensor, platform: Platform) -> BlockScaled:
    rows, cols = x.shape
    data, _ = _allocate(x, fmt, rows, cols, "row", platform)
    how = computed(fmt, fmt.scale_rounding, "row", platform)
    how["SCALE_KIND"] = capability.scale_kind(fmt, scale.dtype)
    br, bc = fmt.block_shape(rows, cols)
    with on_device(x):
        whole_kernels.tensor_kernel[(-(-cols // 1024) * rows,)](
            x, _codes(data, how), _bytes(scale), x, 0, rows, cols, x.stride(0), data.stride(0), *scale.stride(),
            br, bc, 0.0, **how, DIVIDE="ieee", STATIC=True, PARTS=1, C=1024,
        )  # fmt: skip
    return BlockScaled.trusted(data, scale, fmt, "row", (rows, cols))


def _nvfp4_level(x: Tensor, fmt: Format) -> Tensor:
    rows, cols = x.shape
    parts, level = x.new_empty(min(rows, _PARTS), dtype=torch.float32), x.new_empty((), dtype=torch.float32)
    with on_device(x):
        whole_kernels.amax_kernel[(parts.numel(),)](x, parts, rows, cols, x.stride(0), C=1024)
        whole_kernels.level_kernel[(1,)](parts, parts.numel(), level, DIVISOR=448.0 * fmt.max, PARTS=_PARTS)
    return level


def _allocate(
    x: Tensor, fmt: Format, rows: int, cols: int, layout: str, platform: Platform, zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Uninitialised data and scales in the physical shapes of the layout (`layouts.LAYOUTS`)."""
    dtype = torch.float8_e4m3fnuz if layout == "fnuz" else fmt.element.dtype
    data = x.new_empty(fmt.data_shape(rows, cols), dtype=dtype)
    gr, gc = fmt.scale_shape(rows, cols)
    new = x.new_zeros if zero else x.new_empty
    if layout == "ue8m0x4":
        return data, new((-(-gc // 4), -(-gr // 4) * 4), dtype=torch.int32)
    if layout == "tma":
        return data, new((gc, -(-gr // 4) * 4), dtype=torch.float32)
    scale_dtype = torch.float32 if layout == "fnuz" else fmt.scale_dtype
    return data, x.new_empty((gc, gr) if layout == "col_scales" else (gr, gc), dtype=scale_dtype)


def _even(cols: int, group: int) -> bool:
    return cols % group == 0 and group == _pow2(group)


def _codes(data: Tensor, how: dict[str, Any]) -> Tensor:
    return data if data.element_size() > 1 or how["OUT"] == "native" else data.view(torch.uint8)


def _bytes(scales: Tensor) -> Tensor:
    """Float scales as they are; E8M0, E4M3 and packed words as bytes: Triton has no such types."""
    return scales.view(torch.uint8) if scales.dtype in _BYTES else scales


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
