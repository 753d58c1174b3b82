"""Launch dense multiplications: which kernel, which tile, which memory. Floor 4.

Nothing waits for the device; workspaces come from torch's caching allocator and live as long as the call (inside a
captured graph: as long as the graph), so replays and streams cannot meet in them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...numerics import Numerics
from ...platform import Platform
from ...tensor import BlockScaled
from ...tuning import SMALL_M, GemmPath, GemmTile, by_pointers, decoded_rows, gemm_tile, multiprocessors
from . import capability, exact
from . import gemm_kernels as kernels
from .capability import is_grouped, without_fp8
from .dense_kernels import dense_kernel
from .folded_kernels import folded_kernel
from .operands import (
    Reading,
    Values,
    held,
    level_of,
    operand,
    quantize_activations,
    reading,
    scale_args,
    unquantized,
    values_dtype,
)
from .quantize import on_device
from .tma_kernels import tma_kernel

_TMA_PATHS: dict[str, GemmPath] = {"native": "tma", "decoded": "tma16"}
DECODE_FIRST = 512
"""From this many rows on, bytes are decoded to 16 bits once instead of in every tile that reads them: the codes, whose
scales stay apart, and in slices (`tuning.decoded_rows`), so that a call needs memory for one slice only."""


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
    tickets, (m, k) = None, x.shape
    shuffled = m <= exact.FOLDED_M and not invariant and exact.shuffles(m, k, w.format.block[1], platform)
    if fmt is None:
        values = unquantized(x, w, shuffled=shuffled)
        return matmul(values, w, platform, bias=bias, out_dtype=out_dtype, native=native, invariant=invariant)
    shuffled = shuffled and values_dtype(fmt, w, numerics, platform) is not None
    if (m <= SMALL_M or shuffled) and not invariant and is_grouped(fmt) and not fmt.two_level:
        tickets = x.new_empty(-(-w.shape[-2] // 32) + 1, dtype=torch.int32)  # no tile has fewer than 32 rows by 64
    xq = quantize_activations(x, fmt, w, numerics, platform, native=native, tickets=tickets, shuffled=shuffled)
    return matmul(xq, w, platform, bias=bias, out_dtype=out_dtype, native=native, invariant=invariant, tickets=tickets)


def matmul(
    x: BlockScaled | Tensor | Values,
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

    tile: instead of tuning's. tickets: int32 zeros, one for each tile; made here when missing, or too few.
    """
    if not native:
        platform = without_fp8(platform)
    x = held(x, w, platform)
    (m, k), n = x.shape, w.shape[-2]
    folded = isinstance(x, Values) and x.shuffled
    how = reading(x, w, platform, decode_first=m >= DECODE_FIRST and not invariant and not folded)
    x_data = operand(x, how.constants["X_KIND"], how, platform)
    tma = _takes_tma(x, x_data, w, how, platform) and (invariant or not by_pointers(m, n, platform) or folded)
    path = _TMA_PATHS.get(how.path, how.tile_path) if tma else how.tile_path
    y = x_data.new_empty((m, n), dtype=out_dtype)
    rows, block_rows = max(n, 1), w.format.block[0] or 1
    if folded:
        tile = tile or exact.folded_tile(m, n, k, platform)
    elif how.path == "dense" and tma:
        rows, planned = exact.dense_plan(m, n, k, block_rows, platform)
        tile = tile or planned
    elif how.path in ("decoded", "dense"):
        rows = decoded_rows(m, n, k, block_rows, platform)
    for first in range(0, n, rows):
        columns = y if rows >= n else y[:, first : first + rows]
        chosen = tile or gemm_tile(path, m, columns.shape[1], k, how.span, platform, invariant=invariant)
        part, bias_part = _rows(w, first, columns.shape[1]), bias if bias is None or rows >= n else bias[first:][:rows]
        _multiply(x, x_data, part, bias_part, columns, how, chosen, platform, tma, tickets)
    return y


def _rows(w: BlockScaled, first: int, count: int) -> BlockScaled:
    """Rows first … first + count - 1 of a weight; first: where a block of its scales starts."""
    if count == w.shape[-2]:
        return w
    data, block = w.data[first : first + count], w.format.block[0]
    scale = w.scale if block is None else w.scale[first // block : -(-(first + count) // block)]
    return BlockScaled.trusted(data, scale, w.format, w.layout, (count, w.shape[-1]), w.global_scale)


def _multiply(
    x: BlockScaled | Values,
    x_data: Tensor,
    w: BlockScaled,
    bias: Tensor | None,
    y: Tensor,
    how: Reading,
    tile: GemmTile,
    platform: Platform,
    tma: bool,
    tickets: Tensor | None,
) -> None:
    """One launch into `y: [M, N]`, rows of which may lie further apart than N. x_data: x as the kernel reads it."""
    (m, n), k = y.shape, w.shape[-1]
    w_data = operand(w, how.constants["W_KIND"], how, platform)
    sx = scale_args(x) if isinstance(x, BlockScaled) else (None, 0, 0)
    sw, sw_n, sw_k = scale_args(w)
    if how.folded > tile.bk:
        tile = replace(tile, bk=how.folded)
    tiles = -(-m // tile.bm) * -(-n // tile.bn)
    part = None
    if tile.split > 1:
        part = y.new_empty(tiles * tile.split * tile.bm * tile.bn, dtype=torch.float32)
        if tickets is None or tickets.numel() < tiles:
            tickets = y.new_zeros(tiles, dtype=torch.int32)
    common: dict[str, Any] = {
        "BIAS": bias is not None, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP_M": tile.group_m,
        "STAGES": tile.stages, "num_warps": tile.warps, **capability.multiply_options(platform),
    }  # fmt: skip
    slices: dict[str, Any] = {"SPLIT": tile.split, "SWAP": tile.swap}
    with on_device(y):
        if tma and how.path == "weight_only":
            taken = ("W_KIND", "SW_KIND", "W_GROUP", "W_ROWS", "COMPUTE", "X_LEVEL", "W_LEVEL", "LIFT")
            folded_kernel[(tiles, tile.split)](
                _blocks(x_data, tile.bm, tile.bk), _blocks(w_data, tile.bn, tile.bk // (2 if w.format.packed else 1)),
                y, bias, sw, level_of(x), w.global_scale, part, tickets, m, n, k, y.stride(0), sw_n, sw_k,
                **{name: how.constants[name] for name in taken}, SPLIT=tile.split, **common,
            )  # fmt: skip
        elif tma and how.path == "dense":
            dense_kernel[(tiles,)](
                _blocks(x_data, tile.bm, tile.bk), _blocks(w_data, tile.bn, tile.bk), y, bias, level_of(x),
                w.global_scale, m, n, k, y.stride(0), X_LEVEL=how.constants["X_LEVEL"],
                W_LEVEL=how.constants["W_LEVEL"], **common,
            )  # fmt: skip
        elif tma:
            halves = 2 if tile.rescaled else tile.halves
            programs = multiprocessors(platform) * tile.programs
            persistent = 0 < programs < tiles and tile.split == 1
            tma_kernel[(programs if persistent else tiles, tile.split)](
                _blocks(x_data, tile.bm, tile.bk) if tile.rescaled else None,
                _blocks(x_data, tile.bm // halves, tile.bk), _blocks(w_data, tile.bn, tile.bk), y, bias, sx[0], sw,
                part, tickets, m, n, k, y.stride(0), sx[1], sx[2], sw_n, sw_k, SW_KIND=how.constants["SW_KIND"],
                HALVES=halves, RESCALED=tile.rescaled, PERSISTENT=persistent, **slices, **common,
            )  # fmt: skip
        else:
            even = k % tile.bk == 0 and (how.span == 0 or how.span % tile.bk == 0)
            kernels.gemm_kernel[(tiles, tile.split)](
                x_data, w_data, y, bias, sx[0], sw, level_of(x),
                w.global_scale, part, tickets, m, n, k, x_data.stride(0), w_data.stride(0), y.stride(0), sx[1], sx[2],
                sw_n, sw_k, **how.constants, EVEN_K=even, **slices, **common,
            )  # fmt: skip


def _takes_tma(x: BlockScaled | Values, x_data: Tensor, w: BlockScaled, how: Reading, platform: Platform) -> bool:
    """Block copies want rows that begin at multiples of 16 bytes. They serve FP8 (or what it was decoded to) in
    128-wide blocks with fp32 activation scales, and 16-bit values: with weights decoded beforehand, or x shuffled."""
    if not capability.has_tma(platform) or not _whole_rows(x_data):
        return False
    if isinstance(x, Values):
        k = w.shape[-1]
        return k % 8 == 0 if how.path == "dense" else x.shuffled and platform.capability == 90 and _whole_rows(w.data)
    c = how.constants
    return (
        how.path in _TMA_PATHS and x.scale.dtype == torch.float32
        and c["X_GROUP"] == c["W_GROUP"] == c["W_ROWS"] == 128 and c["LIFT"] == 1.0 and w.shape[-1] % 16 == 0
        and w.data.data_ptr() % 16 == 0
    )  # fmt: skip


def _whole_rows(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0


def _blocks(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])
