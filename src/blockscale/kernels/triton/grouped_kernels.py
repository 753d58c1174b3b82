"""One multiplication for each expert, in one launch and without asking the host who got how many rows.

ROWS says how rows find their expert. "sorted": rows lie sorted by expert and `offsets[e]` is the end of expert e's
slice; programs are numbered past all tiles that could be needed and each finds its own. "masked": every expert owns
`capacity` rows, of which the first `counts[e]` hold tokens. "pairs": output row p is input row p // TOP_K times
expert `ids[p]`, for batches so small that sorting them would cost more than reading an expert twice.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: SIM108 (branches on constexprs are chosen when a kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl

from .gemm_kernels import store_tile
from .tiles import accumulate, end_scales, group_index


@triton.jit
def find_rows(
    tile, where_ptr, rows, E, ROWS: tl.constexpr, BM: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr
):
    """Tile number -> (expert, first row of the tile in y, end of the rows that are the expert's).

    Expert E owns the rows behind the last slice, which come out as zero; E + 1 means that there is no such tile.
    """
    if ROWS == "sorted":
        e = tl.arange(0, EXPERTS)
        end = tl.load(where_ptr + e, mask=e < E, other=0)
        end = tl.where(e < E, end, rows)
        start = tl.load(where_ptr + e - 1, mask=(e > 0) & (e <= E), other=0)
        start = tl.where(e > E, rows, start)
        tiles = (tl.maximum(end - start, 0) + BM - 1) // BM
        before = tl.cumsum(tiles, 0) - tiles
        mine = (before <= tile) & (tile < before + tiles)
        expert = tl.sum(tl.where(mine, e, 0), 0)
        found = tl.sum(mine.to(tl.int32), 0) > 0
        first = tl.sum(tl.where(mine, start + (tile - before) * BM, 0), 0)
        last = tl.sum(tl.where(mine, end, 0), 0)
        expert = tl.where(found, expert, E + 1)
    elif ROWS == "masked":
        tiles = (rows + BM - 1) // BM
        expert = tile // tiles
        first = expert * rows + tile % tiles * BM
        last = expert * rows + tl.load(where_ptr + expert)
        expert = tl.where(first < last, expert, E + 1)
    else:
        expert = tl.load(where_ptr + tile)
        expert = tl.where((expert < 0) | (expert > E), E, expert)
        first = tile
        last = tile + 1
    return expert, first, last


@triton.jit(do_not_specialize=["rows", "sx_m", "sx_k"])
def grouped_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    where_ptr,
    sx_ptr,
    sw_ptr,
    w_level_ptr,
    rows,
    E,
    N,
    K,
    x_stride,
    w_expert,
    w_stride,
    y_stride,
    sx_m,
    sx_k,
    sw_expert,
    sw_n,
    sw_k,
    ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    X_KIND: tl.constexpr,
    W_KIND: tl.constexpr,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    SX_KIND: tl.constexpr,
    SW_KIND: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    COMPUTE: tl.constexpr,
    X_LEVEL: tl.constexpr,
    W_LEVEL: tl.constexpr,
    LIFT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BM rows of one expert by BN columns. EXPERTS: a power of two above E."""
    num_n = tl.cdiv(N, BN)
    tile = tl.program_id(0) // num_n
    pn = tl.program_id(0) % num_n
    expert, first, last = find_rows(tile, where_ptr, rows, E, ROWS, BM, EXPERTS, TOP_K)
    if expert <= E:
        rm = first + tl.arange(0, BM)
        rn = pn * BN + tl.arange(0, BN)
        if expert == E:
            acc = tl.zeros((BN, BM), tl.float32) if SWAP else tl.zeros((BM, BN), tl.float32)
            store_tile(acc, y_ptr, y_ptr, rm, rn, last, N, y_stride, False, SWAP)
        else:
            x_row = tl.minimum(rm, last - 1).to(tl.int64) // TOP_K
            w_row = tl.minimum(rn, N - 1).to(tl.int64)
            w_expert_ptr = w_ptr + expert.to(tl.int64) * w_expert
            sw_expert_ptr = sw_ptr + expert.to(tl.int64) * sw_expert
            if W_LEVEL:
                w_level_ptr += expert
            if W_ROWS == 0 or (W_ROWS % BN == 0 and W_SCALE != "fold"):
                sw_row = group_index(pn * BN, W_ROWS)
            else:
                sw_row = group_index(w_row, W_ROWS)
            if SPAN == 0 or SPAN % BK == 0:
                steps = tl.cdiv(K, BK)
            else:
                steps = tl.cdiv(K, SPAN) * ((SPAN + BK - 1) // BK)
            acc = accumulate(
                x_ptr, x_row, x_stride, sx_ptr, sx_m, sx_k, w_expert_ptr, w_row, w_stride,
                sw_expert_ptr, sw_row, sw_n, sw_k, K, 0, steps, X_KIND, W_KIND, X_SCALE, W_SCALE, SX_KIND, SW_KIND,
                X_GROUP, W_GROUP, SPAN, COMPUTE, BM, BN, BK, EVEN_K, SWAP, STAGES,
            )  # fmt: skip
            acc = end_scales(
                acc, sx_ptr, x_row, sx_m, sw_expert_ptr, sw_row, sw_n, sx_ptr, w_level_ptr,
                X_SCALE, W_SCALE, SX_KIND, SW_KIND, X_LEVEL, W_LEVEL, LIFT, SWAP,
            )  # fmt: skip
            store_tile(acc, y_ptr, y_ptr, rm, rn, last, N, y_stride, False, SWAP)
