"""Multiplication of 16-bit activations with weights that are decoded in registers, by block copies (TMA).

Hopper's matrix unit takes its first operand from registers: the weight's rows, decoded there and multiplied by their
scales. Activations come from shared memory, in the order in which a lane holds the columns of codes (`tiles.shuffled`).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from .gemm_kernels import add_slices, store_tile
from .tiles import decoded, fold_scale, group_index, load_scales, shuffled, tile_of, times_levels


@triton.jit(do_not_specialize=["M", "sw_n"])
def folded_kernel(
    x_desc,
    w_desc,
    y_ptr,
    bias_ptr,
    sw_ptr,
    x_level_ptr,
    w_level_ptr,
    part_ptr,
    ticket_ptr,
    M,
    N,
    K,
    y_stride,
    sw_n,
    sw_k,
    W_KIND: tl.constexpr,
    SW_KIND: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BIAS: tl.constexpr,
    X_LEVEL: tl.constexpr,
    W_LEVEL: tl.constexpr,
    LIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: `[BN, BM]` of the transposed result over one of SPLIT slices of K. x_desc: boxes of BM x BK values,
    shuffled; w_desc: boxes of BN rows of the bytes that hold BK codes. K in whole 32."""
    BYTES: tl.constexpr = BK // 2 if W_KIND == "fp4" or W_KIND == "fp4 ptx" else BK
    tile = tl.program_id(0)
    piece = tl.program_id(1)
    pm, pn = tile_of(tile, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    rn = pn * BN + tl.arange(0, BN)
    sw_row = group_index(tl.minimum(rn, N - 1).to(tl.int64), W_ROWS)
    steps = tl.cdiv(K, BK)
    first, last = piece * steps // SPLIT, (piece + 1) * steps // SPLIT
    # One step ahead: such short loads are not pipelined, and the decoder would wait for memory.
    scale = load_scales(sw_ptr, sw_row, sw_n, sw_k, tl.minimum(first, steps - 1) * BK, K, W_GROUP, BK, False)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        w = decoded(w_desc.load([pn * BN, step * BYTES]), W_KIND, COMPUTE)
        x = x_desc.load([pm * BM, step * BK])
        w = shuffled(fold_scale(w, scale, SW_KIND))
        scale = load_scales(sw_ptr, sw_row, sw_n, sw_k, tl.minimum(step + 1, last - 1) * BK, K, W_GROUP, BK, False)
        acc = tl.dot(w, x.T, acc)
    mine = True
    if SPLIT > 1:
        mine, acc = add_slices(acc, part_ptr, ticket_ptr, tile, piece, SPLIT, BM * BN)
    if mine:
        acc = times_levels(acc, x_level_ptr, w_level_ptr, X_LEVEL, W_LEVEL, LIFT)
        store_tile(acc, y_ptr, bias_ptr, pm * BM + tl.arange(0, BM), rn, M, N, y_stride, BIAS, True)
