"""Launch dense multiplications: how operands are read, which kernel, which tile, which memory.

Nothing waits for the device; workspaces come from torch's caching allocator and live as long as the call (inside a
captured graph: as long as the graph), so replays and streams cannot meet in them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...formats import Format
from ...numerics import Numerics
from ...platform import Platform
from ...tensor import BlockScaled
from ...tuning import SMALL_M, GemmPath, GemmTile, gemm_tile, multiprocessors
from . import capability
from . import gemm_kernels as kernels
from .capability import is_grouped
from .quantize import on_device, quantize

DECODE_FIRST = 512
"""From this many rows on, bytes are decoded to 16 bits once instead of in every tile that reads them."""
_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Reading:
    """How a multiplication reads its operands: the constexprs of `tiles.accumulate`, and the path for tuning."""

    path: GemmPath
    constants: dict[str, Any]

    @property
    def span(self) -> int:
        return int(self.constants["SPAN"])


def linear(
    x: Tensor,
    w: BlockScaled,
    bias: Tensor | None,
    numerics: Numerics,
    out_dtype: torch.dtype,
    platform: Platform,
    *,
    native: bool = True,
    invariant: bool = False,
) -> Tensor:
    """`x: [M, K]`, `w: [N, K]` in layout "row" or "fnuz" -> `[M, N]`, activations quantized as `numerics` says.

    native: False keeps to integer codecs, as on a chip without fp8. invariant: a row's bytes do not depend on M.
    """
    fmt = numerics.activation_format(w.format)
    if fmt is None:
        return matmul(x, w, platform, bias=bias, out_dtype=out_dtype, native=native, invariant=invariant)
    tickets = None
    if x.shape[0] <= SMALL_M and not invariant and is_grouped(fmt) and not fmt.two_level:
        tickets = x.new_empty(-(-w.shape[-2] // 32), dtype=torch.int32)  # 32: no tile is narrower
    xq = quantize_activations(x, fmt, w, numerics, platform, native=native, tickets=tickets)
    return matmul(xq, w, platform, bias=bias, out_dtype=out_dtype, native=native, invariant=invariant, tickets=tickets)


def quantize_activations(
    x: Tensor,
    fmt: Format,
    w: BlockScaled,
    numerics: Numerics,
    platform: Platform,
    *,
    native: bool = True,
    tickets: Tensor | None = None,
) -> BlockScaled:
    """x as `reference.quantize_activations` defines it, laid out as `matmul` reads it. tickets: zeroed on the way.

    Powers of two stay bytes only where they are folded into the operand; everywhere else fp32 holds the same values.
    """
    if not native:
        platform = without_fp8(platform)
    layout = "fnuz" if w.layout == "fnuz" else "row"
    if fmt.two_level:
        return quantize(x, fmt, platform, level=w.input_scale)
    if w.input_scale is not None and fmt.block == (None, None):
        return quantize(x, fmt, platform, scale=w.input_scale.reshape(1, 1))
    if not is_grouped(fmt):
        return quantize(x, fmt, platform, floor=numerics.act_floor, layout=layout)
    if fmt.scale_dtype != torch.float32 and not _folds(fmt, fmt.scale_dtype, torch.bfloat16):
        fmt = replace(fmt, scale_dtype=torch.float32)
    if layout == "row" and fmt.scale_dtype == torch.float32:
        layout = "tma"
    return quantize(x, fmt, platform, floor=numerics.act_floor, layout=layout, tickets=tickets)


def matmul(
    x: BlockScaled | Tensor,
    w: BlockScaled,
    platform: Platform,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    native: bool = True,
    invariant: bool = False,
    tile: GemmTile | None = None,
    tickets: Tensor | None = None,
) -> Tensor:
    """`x: [M, K]`, quantized or (weight-only) as it is, times `w: [N, K]` -> `[M, N]`.

    tile: instead of tuning's. tickets: int32 zeros, one for each column tile; made here when missing and needed.
    """
    if not native:
        platform = without_fp8(platform)
    (m, k), n = x.shape, w.shape[-2]
    how = reading(x, w, platform, decode_first=m >= DECODE_FIRST and not invariant)
    tma = _takes_tma(x, w, how, platform)
    if tile is None:
        tile = gemm_tile("tma" if tma else how.path, m, n, k, how.span, platform, invariant=invariant)
    x_data, w_data = operand(x, how.constants["X_KIND"], how), operand(w, how.constants["W_KIND"], how)
    sx = scale_args(x) if isinstance(x, BlockScaled) else (None, 0, 0)
    sw, sw_n, sw_k = scale_args(w)
    y = x_data.new_empty((m, n), dtype=out_dtype)
    tiles = -(-m // tile.bm) * -(-n // tile.bn)
    part = None
    if tile.split > 1:
        part = y.new_empty(tiles * tile.split * tile.bm * tile.bn, dtype=torch.float32)
        if tickets is None:
            tickets = y.new_zeros(tiles, dtype=torch.int32)
    common: dict[str, Any] = {
        "BIAS": bias is not None, "BM": tile.bm, "BN": tile.bn, "SPLIT": tile.split, "SWAP": tile.swap,
        "GROUP_M": tile.group_m, "STAGES": tile.stages, "num_warps": tile.warps,
    }  # fmt: skip
    with on_device(y):
        if tma:
            programs = min(tiles, multiprocessors(platform) * tile.programs) if tile.programs else tiles
            kernels.tma_kernel[(programs, tile.split)](
                _blocks(x_data, tile.bm), _blocks(w_data, tile.bn), y, bias, sx[0], sw, part, tickets, m, n, k,
                y.stride(0), sx[1], sx[2], sw_n, sw_k, SW_KIND=how.constants["SW_KIND"], **common,
            )  # fmt: skip
        else:
            even = k % tile.bk == 0 and (how.span == 0 or how.span % tile.bk == 0)
            kernels.gemm_kernel[(tiles, tile.split)](
                x_data, w_data, y, bias, sx[0], sw, x.global_scale if isinstance(x, BlockScaled) else None,
                w.global_scale, part, tickets, m, n, k, x_data.stride(0), w_data.stride(0), y.stride(0), sx[1], sx[2],
                sw_n, sw_k, **how.constants, EVEN_K=even, BK=tile.bk, **common,
            )  # fmt: skip
    return y


def reading(x: BlockScaled | Tensor, w: BlockScaled, platform: Platform, *, decode_first: bool = False) -> Reading:
    """How x and w are read on this platform. Pure: looks at formats, layouts and dtypes, never at values."""
    w_element = "fp8fnuz" if w.layout == "fnuz" else w.format.element.name
    if isinstance(x, Tensor):
        compute = x.dtype if x.dtype != torch.bfloat16 else capability.bf16_dot(platform)
        x_kind, path = "value" if compute == x.dtype else "cast", "weight_only"
        w_kind = "cast" if capability.native_load(platform, w_element) else w_element
    else:
        x_element = "fp8fnuz" if x.layout == "fnuz" else x.format.element.name
        powers = any(q.scale.dtype == torch.float8_e8m0fnu and _folds(q.format, q.scale.dtype, torch.bfloat16)
                     for q in (x, w))  # fmt: skip
        compute = capability.bf16_dot(platform) if powers and platform.arch != "sm_75" else torch.float16
        if x_element == w_element and capability.dot_element(platform, w_element):
            x_kind, w_kind, path = "value", "value", "native"
        elif decode_first and x.format.element.bits == w.format.element.bits == 8:
            x_kind, w_kind, path = "value", "value", "decoded"
        else:
            x_kind = "cast" if capability.native_load(platform, x_element) else x_element
            w_kind = "cast" if capability.native_load(platform, w_element) else w_element
            path = "codec"
    x_scale, x_group = _scaling(x, compute, path) if isinstance(x, BlockScaled) else ("none", 0)
    w_scale, w_group = _scaling(w, compute, path)
    loops = [group for how, group in ((x_scale, x_group), (w_scale, w_group)) if how == "loop"]
    constants = {
        "X_KIND": x_kind, "W_KIND": w_kind, "X_SCALE": x_scale, "W_SCALE": w_scale,
        "SX_KIND": capability.scale_kind(x.format, x.scale.dtype) if isinstance(x, BlockScaled) else "float",
        "SW_KIND": capability.scale_kind(w.format, w.scale.dtype), "X_GROUP": x_group, "W_GROUP": w_group,
        "W_ROWS": w.format.block[0] or 0, "SPAN": gcd(*loops) if loops else 0, "COMPUTE": _TL[compute],
        "X_LEVEL": isinstance(x, BlockScaled) and x.global_scale is not None, "W_LEVEL": w.global_scale is not None,
    }  # fmt: skip
    return Reading(path, constants)  # type: ignore[arg-type]


def without_fp8(platform: Platform) -> Platform:
    """The same chip as if it had no fp8: what an owner of the generation before gets, on the chip at hand."""
    return replace(platform, arch="sm_80") if platform.kind == "cuda" else platform


def _scaling(q: BlockScaled, compute: torch.dtype, path: str) -> tuple[str, int]:
    group = q.format.block[1]
    if group is None or group >= q.shape[-1]:
        return "end", 0
    if path != "native" and _folds(q.format, q.scale.dtype, compute):
        return "fold", group
    return "loop", group


def _folds(fmt: Format, scale_dtype: torch.dtype, compute: torch.dtype) -> bool:
    """Whether element times scale is exact in `compute` and groups are short enough for it to pay."""
    group = fmt.block[1]
    if group not in (16, 32, 64):
        return False
    if scale_dtype == torch.float8_e8m0fnu:  # a power of two moves the exponent, and fp16 has too few of them
        return compute in (torch.bfloat16, torch.float32)
    return scale_dtype == torch.float8_e4m3fn and fmt.packed  # 2 by 4 significant bits; bf16 has 8, fp16 11


def operand(q: BlockScaled | Tensor, kind: str, how: Reading) -> Tensor:
    """The tensor that the kernel reads: values, native fp8, bytes, or bytes decoded here."""
    if isinstance(q, Tensor):
        return q if q.stride(-1) == 1 else q.contiguous()
    if how.path == "decoded":
        y = q.data.new_empty(
            q.data.shape, dtype=torch.bfloat16 if how.constants["COMPUTE"] == tl.bfloat16 else torch.float16
        )
        element = "fp8fnuz" if q.layout == "fnuz" else q.format.element.name
        with on_device(y):
            kernels.decode_kernel[(-(-y.numel() // 4096),)](
                q.data.view(torch.uint8), y, y.numel(), KIND=element, BLOCK=4096
            )
        return y
    return q.data if kind in ("value", "cast") else q.data.view(torch.uint8)


def scale_args(q: BlockScaled) -> tuple[Tensor, int, int]:
    """(scales as Triton takes them, stride of a row of the scale grid, stride of a K group)."""
    scale = q.scale
    if scale.dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fn):
        scale = scale.view(torch.uint8)
    if q.layout in ("tma", "col_scales"):
        return scale, 1, scale.stride(0)
    return scale, scale.stride(-2) if q.format.block[0] is not None else 0, scale.stride(-1)


def _takes_tma(x: BlockScaled | Tensor, w: BlockScaled, how: Reading, platform: Platform) -> bool:
    """Block copies: FP8 in 128-wide blocks with fp32 activation scales, whole 16-byte units of K."""
    c = how.constants
    return (
        how.path == "native" and capability.has_tma(platform) and isinstance(x, BlockScaled)
        and x.scale.dtype == torch.float32 and c["X_GROUP"] == c["W_GROUP"] == c["W_ROWS"] == 128
        and w.shape[-1] % 16 == 0 and w.data.data_ptr() % 16 == 0 and x.data.data_ptr() % 16 == 0
    )  # fmt: skip


def _blocks(t: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, 128])
