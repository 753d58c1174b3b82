"""How a multiplication reads its operands: as they are, decoded in the loop or beforehand, scaled where. Floor 4."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor

from ...formats import Format
from ...numerics import Numerics
from ...platform import Platform
from ...tensor import BlockScaled
from ...tuning import GemmPath
from . import capability, ptx
from .capability import is_grouped, without_fp8
from .dense_kernels import decode_scaled_kernel, shuffle_kernel
from .gemm_kernels import decode_kernel
from .quantize import on_device, quantize, quantized_values

_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_LIFT = {"ptx": ptx.FP16_LIFT, "fp4 ptx": ptx.FP4_FP16_LIFT, "ptx checked": ptx.CHECKED_LIFT}


@dataclass(frozen=True)
class Values:
    """Activations `[M, K]` as the numbers that are multiplied: never quantized, or their scales are in them.

    level: NVFP4's second level, which multiplies the sums; one number, or one for each expert. shuffled: columns in the
    order of `tiles.shuffled`, for weights that are decoded in the loop.
    """

    data: Tensor
    level: Tensor | None = None
    shuffled: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.data.shape


@dataclass(frozen=True)
class Reading:
    """The constexprs of `tiles.accumulate` for two operands, and the path that tuning knows them by.

    "dense": the weight is decoded with its scales before it is multiplied.
    """

    path: Literal["native", "codec", "decoded", "weight_only", "dense"]
    constants: dict[str, Any]

    @property
    def tile_path(self) -> GemmPath:
        """What tuning calls it."""
        if self.folded and self.path == "codec":
            return "codec_fold"
        return "weight_only_fold" if self.folded and self.path == "weight_only" else self.path

    @property
    def span(self) -> int:
        """Elements of K that share scales; 0: all."""
        return int(self.constants["SPAN"])

    @property
    def folded(self) -> int:
        """Widest group whose scales are folded into an operand, which a K step must hold whole; 0: none."""
        c = self.constants
        return max(int(c[f"{side}_GROUP"]) if c[f"{side}_SCALE"] == "fold" else 0 for side in "XW")


def quantize_activations(
    x: Tensor,
    fmt: Format,
    w: BlockScaled,
    numerics: Numerics,
    platform: Platform,
    *,
    native: bool = True,
    tickets: Tensor | None = None,
    level: Tensor | None = None,
    shuffled: bool = False,
) -> BlockScaled | Values:
    """x as `reference.quantize_activations` defines it, held as `reading` wants it. tickets: zeroed on the way.

    level: NVFP4's second level, where it is known: one number, or one for each row. shuffled: as `Values` has it, if it
    becomes values with their scales. Codes stay codes where matrix instructions take them; they become values where
    every tile would decode them again, and values times scales where that is exact and spares the promotion of short
    groups: the numbers are the same.
    """
    if not native:
        platform = without_fp8(platform)
    layout = "fnuz" if w.layout == "fnuz" else "row"
    level = w.input_scale if fmt.two_level and level is None else level
    exact = values_dtype(fmt, w, numerics, platform)
    if exact is not None:
        return Values(
            *quantized_values(
                x, fmt, platform, exact, floor=numerics.act_floor, level=level, tickets=tickets, shuffled=shuffled
            ),
            shuffled,
        )
    if fmt.two_level:
        return quantize(x, fmt, platform, level=level)
    if w.input_scale is not None and fmt.block == (None, None):
        return quantize(x, fmt, platform, scale=w.input_scale.reshape(1, 1))
    if not is_grouped(fmt):
        return quantize(x, fmt, platform, floor=numerics.act_floor, layout=layout)
    values = None
    if not _powers(fmt, fmt.scale_dtype, platform):
        fmt = _with_float_scales(fmt)
        element = "fp8fnuz" if layout == "fnuz" else fmt.element.name
        if layout == "row":
            layout = "tma"
            values = None if _native(element, w, platform) else compute_dtype(False, w, platform)
    return quantize(x, fmt, platform, floor=numerics.act_floor, layout=layout, tickets=tickets, values=values)


def values_dtype(fmt: Format, w: BlockScaled, numerics: Numerics, platform: Platform) -> torch.dtype | None:
    """What activations quantized to fmt become if they are held as values times their scales; None: they are not."""
    if w.layout != "row" or not is_grouped(fmt) or numerics.act_floor < capability.SMALLEST_FLOOR:
        return None
    return capability.common_dtype(fmt, fmt.scale_dtype, w.format, w.scale.dtype, platform)


def unquantized(x: Tensor, w: BlockScaled, *, shuffled: bool) -> Values:
    """Activations of weight-only multiplication. shuffled: as `Values` has it, where weights are decoded with their
    scales to x's dtype."""
    if not shuffled or x.element_size() != 2 or not capability.holds_products(w.format, w.scale.dtype, x.dtype):
        return Values(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    (rows, k), y = x.shape, x.new_empty(x.shape)
    with on_device(y):
        shuffle_kernel[(-(-rows // 4) * -(-k // 512),)](x, y, rows, k, x.stride(0), R=4, BK=512)
    return Values(y, None, True)


def held(x: BlockScaled | Tensor | Values, w: BlockScaled, platform: Platform) -> BlockScaled | Values:
    """x as `reading` takes it: what is quantized, but would be promoted too often, is decoded with its scales."""
    if isinstance(x, Tensor):
        return Values(x)
    if isinstance(x, Values) or x.data.dtype in _TL or "fnuz" in (x.layout, w.layout):
        return x
    dtype = capability.common_dtype(x.format, x.scale.dtype, w.format, w.scale.dtype, platform)
    return x if dtype is None else Values(products(x, dtype, platform), x.global_scale)


def reading(x: BlockScaled | Values, w: BlockScaled, platform: Platform, *, decode_first: bool = False) -> Reading:
    """How x and w are read on this platform. Pure: looks at formats, layouts and dtypes, never at values."""
    path: Literal["native", "codec", "decoded", "weight_only", "dense"]
    if isinstance(x, Values):
        dtype = x.data.dtype
        path, compute = "weight_only", dtype if dtype != torch.bfloat16 else capability.bf16_dot(platform)
        x_scale, x_group, x_kind = "none", 0, "value" if compute == dtype else "cast"
        w_scale, w_group = _scaling(w, compute, path, platform)
        if decode_first and x_kind == "value" and capability.holds_products(w.format, w.scale.dtype, compute):
            path, w_scale, w_group = "dense", "none", 0
    else:
        path, compute = "codec", compute_dtype(_powers(x.format, x.scale.dtype, platform), w, platform)
        if x.data.dtype in _TL:
            compute = x.data.dtype
        elif _native(_element(x), w, platform):
            path = "native"
        if path != "native" and decode_first and x.format.element.bits == w.format.element.bits == 8:
            path = "decoded"
        x_scale, x_group = _scaling(x, compute, path, platform)
        w_scale, w_group = _scaling(w, compute, path, platform)
        if not _whole_groups(x_scale, x_group, w_scale, w_group):
            x_scale, w_scale = ("loop" if how == "fold" else how for how in (x_scale, w_scale))
        x_kind = "value" if x.format.element.bits == 8 and (path != "codec" or x_scale != "fold") else ""
        x_kind = x_kind or _kind(x, compute, platform)
        x_kind = _checked(x_kind, compute)
    w_kind = "value" if path in ("native", "decoded", "dense") else _kind(w, compute, platform)
    if path == "codec":
        w_kind = _checked(w_kind, compute)
    loops = [group for how, group in ((x_scale, x_group), (w_scale, w_group)) if how == "loop"]
    constants = {
        "X_KIND": x_kind, "W_KIND": w_kind, "X_SCALE": x_scale, "W_SCALE": w_scale,
        "SX_KIND": capability.scale_kind(x.format, x.scale.dtype) if isinstance(x, BlockScaled) else "float",
        "SW_KIND": capability.scale_kind(w.format, w.scale.dtype), "X_GROUP": x_group, "W_GROUP": w_group,
        "W_ROWS": w.format.block[0] or 0, "SPAN": gcd(*loops) if loops else 0, "COMPUTE": _TL[compute],
        "X_LEVEL": level_of(x) is not None, "W_LEVEL": w.global_scale is not None,
        "SHUFFLED": isinstance(x, Values) and x.shuffled,
        "LIFT": _LIFT.get(x_kind, 1.0) * _LIFT.get(w_kind, 1.0) if compute == torch.float16 else 1.0,
    }  # fmt: skip
    return Reading(path, constants)


def compute_dtype(powers: bool, w: BlockScaled, platform: Platform) -> torch.dtype:
    """What decoded codes are multiplied in. fp16 holds every code; folded powers of two need bf16's exponent."""
    powers = powers or _powers(w.format, w.scale.dtype, platform)
    return capability.bf16_dot(platform) if powers and platform.arch != "sm_75" else torch.float16


def operand(q: BlockScaled | Values, kind: str, how: Reading, platform: Platform) -> Tensor:
    """The tensor that the kernel reads: values, native fp8, bytes, or bytes decoded here."""
    if isinstance(q, Values):
        return q.data if q.data.stride(-1) == 1 else q.data.contiguous()
    if how.path == "dense":
        return products(q, next(d for d, t in _TL.items() if t == how.constants["COMPUTE"]), platform)
    if kind == "value" and how.path != "native" and q.data.dtype not in _TL:
        dtype = next(d for d, t in _TL.items() if t == how.constants["COMPUTE"])
        y = q.data.new_empty(q.data.shape, dtype=dtype)
        with on_device(y):
            decode_kernel[(-(-y.numel() // 4096),)](
                q.data.view(torch.uint8), y, y.numel(), KIND=_element(q), BLOCK=4096
            )
        return y
    return q.data if kind in ("value", "cast") else q.data.view(torch.uint8)


def products(q: BlockScaled, dtype: torch.dtype, platform: Platform) -> Tensor:
    """Code times scale `[rows, K]` in a dtype that holds it; NVFP4's second level stays apart."""
    (rows, k), kind = q.shape, _kind(q, dtype, platform)
    y, (scale, s_row, s_k) = q.data.new_empty(rows, k, dtype=dtype), scale_args(q)
    with on_device(y):
        decode_scaled_kernel[(-(-rows // 16) * -(-k // 256),)](
            q.data.view(torch.uint8) if kind != "cast" else q.data, scale, y, rows, k, q.data.stride(0), s_row, s_k,
            KIND=kind, S_KIND=capability.scale_kind(q.format, q.scale.dtype), GROUP=q.format.block[1],
            ROWS=q.format.block[0] or 0, LIFT=_LIFT.get(kind, 1.0) if dtype == torch.float16 else 1.0,
            EVEN_K=k % 256 == 0, R=16, BK=256,
        )  # fmt: skip
    return y


def scale_args(q: BlockScaled) -> tuple[Tensor, int, int]:
    """(scales as Triton takes them, stride of a row of the scale grid, stride of a K group)."""
    scale = q.scale
    if scale.dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fn):
        scale = scale.view(torch.uint8)
    row, group = (1, scale.stride(0)) if q.layout in ("tma", "col_scales") else (scale.stride(-2), scale.stride(-1))
    return scale, row if q.format.block[0] is not None else 0, group


def level_of(x: BlockScaled | Values) -> Tensor | None:
    """Second-level scales of the activations."""
    return x.level if isinstance(x, Values) else x.global_scale


@cache
def _with_float_scales(fmt: Format) -> Format:
    return replace(fmt, scale_dtype=torch.float32)


def _element(q: BlockScaled) -> str:
    return "fp8fnuz" if q.layout == "fnuz" else q.format.element.name


def _native(x_element: str, w: BlockScaled, platform: Platform) -> bool:
    return x_element == _element(w) and capability.dot_element(platform, x_element)


def _kind(q: BlockScaled, compute: torch.dtype, platform: Platform) -> str:
    """How bytes become 16-bit floats in the loop."""
    element = _element(q)
    if element in ("fp8", "fp4") and capability.ptx_decode(platform, compute):
        return "ptx" if element == "fp8" else "fp4 ptx"
    return "cast" if capability.native_load(platform, element) else element


def _checked(kind: str, compute: torch.dtype) -> str:
    """The faster decoder to fp16, where both operands are codes: finite or NaN."""
    return "ptx checked" if kind == "ptx" and compute == torch.float16 else kind


def _scaling(q: BlockScaled, compute: torch.dtype, path: str, platform: Platform) -> tuple[str, int]:
    """(how scales enter, elements of K that share one); see `tiles`."""
    group = q.format.block[1]
    if group is None or group >= q.shape[-1]:
        return "end", 0
    powers = _powers(q.format, q.scale.dtype, platform)
    exact = compute in (torch.bfloat16, torch.float32) if powers else q.format.two_level
    return ("fold" if exact and path != "native" else "loop"), group


def _whole_groups(x_scale: str, x_group: int, w_scale: str, w_group: int) -> bool:
    """Whether every step of the loop starts where a folded group does: a span of "loop" scales holds whole ones."""
    if x_scale == "loop" and w_scale == "fold":
        return x_group % w_group == 0
    return not (x_scale == "fold" and w_scale == "loop") or w_group % x_group == 0


def _powers(fmt: Format, scale_dtype: torch.dtype, platform: Platform) -> bool:
    """Scales that are powers of two, of groups so short that folding them into the operand pays: no longer than a K
    step, and Intel's are 32 (64 would spill)."""
    short = (16, 32) if platform.kind == "xpu" else (16, 32, 64)
    return scale_dtype == torch.float8_e8m0fnu and fmt.block[1] in short
