"""Launch multiplications by experts: rows sorted, masked, or in (row, expert) pairs.

The host never learns how many rows an expert got: grids are upper bounds from shapes, so calls can be captured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ...errors import ShapeError
from ...formats import Format
from ...numerics import Numerics
from ...platform import Platform
from ...tensor import BlockScaled
from ...tuning import GemmTile, gemm_tile
from . import exact
from .capability import multiply_options, without_fp8
from .grouped_kernels import grouped_kernel, levels_kernel
from .operands import Values, held, level_of, operand, quantize_activations, reading, scale_args, unquantized
from .quantize import on_device
from .quantize_whole import amax_kernel

Rows = Literal["sorted", "masked", "pairs"]


def grouped_linear(
    x: Tensor,
    w: BlockScaled,
    where: Tensor,
    numerics: Numerics,
    out_dtype: torch.dtype,
    platform: Platform,
    *,
    rows: Rows = "sorted",
    native: bool = True,
    invariant: bool = False,
) -> Tensor:
    """x times the experts `w: [E, N, K]`, activations as `numerics` says; the rest as in `grouped_matmul`."""
    fmt = numerics.activation_format(w.format)
    shuffled = not invariant and exact.shuffles(_per_expert(x, w, rows), x.shape[1], w.format.block[1], platform)
    xq: BlockScaled | Values = unquantized(x, w, shuffled=shuffled and fmt is None)
    if fmt is not None and not fmt.two_level:
        xq = quantize_activations(x, fmt, w, numerics, platform, native=native, shuffled=shuffled)
    if fmt is None or not fmt.two_level:
        return grouped_matmul(
            xq, w, where, platform, rows=rows, out_dtype=out_dtype, native=native, invariant=invariant
        )
    levels, by_row = expert_levels(x, fmt, where, w, rows)
    if rows == "pairs":  # a row has another level, so other codes, for every expert that it meets
        x, where = x.repeat_interleave(where.shape[1], 0), where.reshape(-1, 1)
    xq = quantize_activations(x, fmt, w, numerics, platform, native=native, level=by_row, shuffled=shuffled)
    xq = replace(xq, level=levels) if isinstance(xq, Values) else replace(xq, global_scale=levels)
    return grouped_matmul(xq, w, where, platform, rows=rows, out_dtype=out_dtype, native=native, invariant=invariant)


def _per_expert(x: Tensor | BlockScaled | Values, w: BlockScaled, rows: Rows) -> int:
    """Rows that an expert gets on average: what a tile is chosen for."""
    return 1 if rows == "pairs" else max(x.shape[0] // w.shape[0], 1)


def expert_levels(x: Tensor, fmt: Format, where: Tensor, w: BlockScaled, rows: Rows) -> tuple[Tensor, Tensor]:
    """NVFP4's second level: (fp32 `[E]`, one for each expert's rows; fp32, the same spread over the rows of y).

    `amax / (448 * 6)` of the rows that an expert gets, or what is stored beside its weight.
    """
    experts, top_k = w.shape[0], where.shape[1] if rows == "pairs" else 1
    count = x.shape[0] * top_k
    amax, by_row, levels = (x.new_empty(n, dtype=torch.float32) for n in (x.shape[0], count, experts))
    given = w.input_scale
    with on_device(x):
        if given is None:
            amax_kernel[(x.shape[0],)](x, amax, x.shape[0], x.shape[1], x.stride(0), C=1024)
        levels_kernel[(experts + 1,)](
            amax, where, given, levels, by_row, count // experts if rows == "masked" else count, experts, ROWS=rows,
            TOP_K=top_k, GIVEN=given is not None, DIVISOR=448.0 * fmt.max, BLOCK=256,
        )  # fmt: skip
    return levels, by_row


def grouped_matmul(
    x: BlockScaled | Tensor | Values,
    w: BlockScaled,
    where: Tensor,
    platform: Platform,
    *,
    rows: Rows = "sorted",
    out_dtype: torch.dtype = torch.bfloat16,
    native: bool = True,
    invariant: bool = False,
    tile: GemmTile | None = None,
) -> Tensor:
    """x, quantized or as it is, times the experts `w: [E, N, K]`.

    rows "sorted": x `[T, K]`, where = offsets int32 `[E]`, rising, the end row of each expert's slice -> `[T, N]`; rows
    behind the last come out as zero. "masked": x `[E * capacity, K]`, where = counts int32 `[E]` -> `[E * capacity,
    N]`; rows past an expert's count come out as zero. "pairs": x `[T, K]`, where = expert ids int32 `[T, top_k]` ->
    `[T * top_k, N]`; ids outside 0 … E - 1 give rows of zeros.

    Raises ShapeError when shapes do not fit.
    """
    if not native:
        platform = without_fp8(platform)
    x = held(x, w, platform)
    experts, n, k = w.shape
    m = x.shape[0]
    if x.shape[1] != k or (rows != "pairs" and tuple(where.shape) != (experts,)):
        raise ShapeError(
            f"grouped ({rows}): x {list(x.shape)}, w {list(w.shape)} and where {list(where.shape)} do not fit"
        )
    how, where = reading(x, w, platform), where.contiguous()
    top_k = 1
    if rows == "sorted" or rows == "masked":
        out_rows = m
    else:
        top_k = where.numel() // m
        out_rows = where.numel()
    per_expert = _per_expert(x, w, rows)
    if tile is None and isinstance(x, Values) and x.shuffled:
        tile = exact.folded_tile(per_expert, n * experts, k, platform)  # experts fill the chip as a wide weight does
    elif tile is None:
        tile = gemm_tile(how.tile_path, per_expert, n, k, how.span, platform, invariant=invariant)
    tile = replace(tile, split=1, bk=max(tile.bk, how.folded))
    if rows == "sorted":
        tiles = -(-m // tile.bm) + min(experts + 1, m)  # each slice ends in at most one broken tile
    else:
        tiles = experts * -(-per_expert // tile.bm) if rows == "masked" else out_rows
    x_data, w_data = (operand(q, how.constants[f"{side}_KIND"], how, platform) for q, side in ((x, "X"), (w, "W")))
    sx, sx_m, sx_k = scale_args(x) if isinstance(x, BlockScaled) else (None, 0, 0)
    sw, sw_n, sw_k = scale_args(w)
    y = x_data.new_empty((out_rows, n), dtype=out_dtype)
    even = k % tile.bk == 0 and (how.span == 0 or how.span % tile.bk == 0)
    with on_device(y):
        grouped_kernel[(tiles * -(-n // tile.bn),)](
            x_data, w_data, y, where, sx, sw, level_of(x), w.global_scale,
            per_expert if rows == "masked" else out_rows, experts,
            n, k, x_data.stride(0), w_data.stride(0), w_data.stride(1), y.stride(0), sx_m, sx_k, sw.stride(0), sw_n,
            sw_k, ROWS=rows, TOP_K=top_k, EXPERTS=1 << experts.bit_length(), **how.constants, EVEN_K=even, BM=tile.bm,
            BN=tile.bn, BK=tile.bk, SWAP=tile.swap, STAGES=tile.stages, num_warps=tile.warps,
            **multiply_options(platform),
        )  # fmt: skip
    return y
