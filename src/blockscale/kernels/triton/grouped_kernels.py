"""One multiplication for each expert, in one launch and without asking the host who got how many rows.

ROWS says how rows find their expert. "sorted": rows lie sorted by expert and `offsets[e]` is the end of expert e's
slice; programs are numbered past all tiles that could be needed and each finds its own. "masked": every expert owns
`capacity` rows, of which the first `counts[e]` hold tokens; the others come out as zero. "pairs": output row p is
input row p // TOP_K times expert `ids[p]`, for batches so small that sorting them would cost more than reading an
expert twice.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from .gemm_kernels import store_tile
from .tiles import accumulate, count_steps, end_scales, scale_rows


@triton.jit
def find_rows(
    tile, where_ptr, rows, E, ROWS: tl.constexpr, BM: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr
):
    """Tile number -> (expert, first row of the tile in y, end of the expert's rows, end of the rows to write).

    Expert E owns the rows that come out as zero; E + 1 means that there is no such tile.
    """
    if ROWS == "sorted":
        e = tl.arange(0, EXPERTS)
        ends = tl.load(where_ptr + e, mask=e < E, other=0)
        ends = tl.where(e < E, ends, rows)
        start = tl.load(where_ptr + e - 1, mask=(e > 0) & (e <= E), other=0)
        start = tl.where(e > E, rows, start)
        tiles = (tl.maximum(ends - start, 0) + BM - 1) // BM
        before = tl.cumsum(tiles, 0) - tiles
        mine = (before <= tile) & (tile < before + tiles)
        expert = tl.sum(tl.where(mine, e, 0), 0)
        found = tl.sum(mine.to(tl.int32), 0) > 0
        first = tl.sum(tl.where(mine, start + (tile - before) * BM, 0), 0)
        last = tl.sum(tl.where(mine, ends, 0), 0)
        expert = tl.where(found, expert, E + 1)
        end = last
    elif ROWS == "masked":
        tiles = (rows + BM - 1) // BM
        owner = tile // tiles
        first = owner * rows + tile % tiles * BM
        last = owner * rows + tl.load(where_ptr + owner)
        end = owner * rows + rows
        expert = tl.where(first < last, owner, E)
    else:
        expert = tl.load(where_ptr + tile)
        expert = tl.where((expert < 0) | (expert > E), E, expert)
        first = tile
        last = tile + 1
        end = last
    return expert, first, last, end


@triton.jit(do_not_specialize=["rows", "E", "sx_m", "sx_k", "sw_expert", "sw_n"])
def grouped_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    where_ptr,
    sx_ptr,
    sw_ptr,
    x_level_ptr,
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
    SHUFFLED: tl.constexpr,
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
    expert, first, last, end = find_rows(tile, where_ptr, rows, E, ROWS, BM, EXPERTS, TOP_K)
    if expert <= E:
        rm = first + tl.arange(0, BM)
        rn = pn * BN + tl.arange(0, BN)
        if expert == E:
            acc = tl.zeros((BN, BM), tl.float32) if SWAP else tl.zeros((BM, BN), tl.float32)
            store_tile(acc, y_ptr, y_ptr, rm, rn, end, N, y_stride, False, SWAP)
        else:
            x_row = tl.minimum(rm, last - 1).to(tl.int64) // TOP_K
            w_row = tl.minimum(rn, N - 1).to(tl.int64)
            w_expert_ptr = w_ptr + expert.to(tl.int64) * w_expert
            sw_expert_ptr = sw_ptr + expert.to(tl.int64) * sw_expert
            if W_LEVEL:
                w_level_ptr += expert
            if X_LEVEL:
                x_level_ptr += expert
            sw_row = scale_rows(w_row, pn * BN, BN, W_ROWS, W_SCALE)
            acc = accumulate(
                x_ptr, x_row, x_stride, sx_ptr, sx_m, sx_k, w_expert_ptr, w_row, w_stride,
                sw_expert_ptr, sw_row, sw_n, sw_k, K, 0, count_steps(K, SPAN, BK), X_KIND, W_KIND, X_SCALE, W_SCALE,
                SX_KIND, SW_KIND, X_GROUP, W_GROUP, SPAN, COMPUTE, BM, BN, BK, EVEN_K, SWAP, SHUFFLED, STAGES,
            )  # fmt: skip
            acc = end_scales(
                acc, sx_ptr, x_row, sx_m, sw_expert_ptr, sw_row, sw_n, x_level_ptr, w_level_ptr,
                X_SCALE, W_SCALE, SX_KIND, SW_KIND, X_LEVEL, W_LEVEL, LIFT, SWAP,
            )  # fmt: skip
            if ROWS == "masked":
                acc = tl.where((rm < last)[None, :] if SWAP else (rm < last)[:, None], acc, 0.0)
            store_tile(acc, y_ptr, y_ptr, rm, rn, end, N, y_stride, False, SWAP)


@triton.jit(do_not_specialize=["rows", "E"])
def levels_kernel(
    amax_ptr,
    where_ptr,
    given_ptr,
    level_ptr,
    row_ptr,
    rows,
    E,
    ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    GIVEN: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second-level scales of activations, one for each expert's rows: `level[e]`, and `row[r]` for each row of y.

    One program an expert, and one more that gives rows of no expert a 1. amax: fp32, one a row of x. rows: of y, or
    with "masked" of one expert. GIVEN: levels are stored beside the weight and only spread over rows.
    """
    e = tl.program_id(0)
    if ROWS == "sorted":
        first = tl.load(where_ptr + e - 1, mask=e > 0, other=0)
        last = tl.load(where_ptr + e, mask=e < E, other=rows)
        end = last
    elif ROWS == "masked":
        first = e * rows
        last = first + tl.load(where_ptr + e, mask=e < E, other=0)
        end = tl.where(e < E, first + rows, first)
    else:
        first = 0
        last = rows
        end = rows
    if GIVEN:
        level = tl.load(given_ptr + e, mask=e < E, other=1.0)
    else:
        amax = tl.zeros([BLOCK], tl.float32)
        for r0 in range(first, last, BLOCK):
            r = r0 + tl.arange(0, BLOCK)
            mine = r < last
            if ROWS == "pairs":
                mine = mine & (tl.load(where_ptr + r, mask=mine, other=-1) == e)
            amax = tl.maximum(amax, tl.load(amax_ptr + r // TOP_K, mask=mine, other=0.0))
        level = tl.div_rn(tl.max(amax, axis=0), DIVISOR)
        level = tl.where((level > 0) & (e < E), level, 1.0)
    tl.store(level_ptr + e, level, mask=e < E)
    for r0 in range(first, end, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        mine = r < end
        if ROWS == "pairs":
            owner = tl.load(where_ptr + r, mask=mine, other=0)
            owner = tl.where((owner < 0) | (owner > E), E, owner)
            mine = mine & (owner == e)
        tl.store(row_ptr + r, tl.zeros([BLOCK], tl.float32) + level, mask=mine)
