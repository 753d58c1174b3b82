"""Dense multiplication by block copies (TMA), where the chip has them: FP8 or 16-bit operands in 128-wide blocks.

Two ways to bring in the scales: products of a step of K times its scales are added to fp32 sums (`promoted_tile`), or
the sums are held in units of the scale at hand and the matrix unit adds to them (`rescaled`).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from .codec import decode_scale
from .gemm_kernels import add_slices, store_tile
from .ptx import add_scaled_ptx
from .tiles import tile_of


@triton.jit
def promoted_tile(
    x_desc, w_desc, y_ptr, bias_ptr, sx_ptr, sw_at, part_ptr, ticket_ptr, M, N, K, y_stride, sx_m, sx_k, sw_k, tile, m0,
    n0, SW_KIND: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, SWAP: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The tile from row m0 of x and n0 of w: products of a step, times its scales, are added to fp32 sums.

    Boxes of x_desc hold BM // HALVES rows.
    """
    piece = tl.program_id(1)
    steps = tl.cdiv(K, BK)
    H: tl.constexpr = BM // HALVES
    rm = m0 + tl.arange(0, H)
    rn = n0 + tl.arange(0, BN)
    sx_at = sx_ptr + tl.minimum(rm, M - 1).to(tl.int64) * sx_m
    acc = tl.zeros((BN, H), tl.float32) if SWAP else tl.zeros((H, BN), tl.float32)
    if HALVES == 2:
        sx_low = sx_ptr + tl.minimum(rm + H, M - 1).to(tl.int64) * sx_m
        low = tl.zeros((H, BN), tl.float32)
    for step in tl.range(piece * steps // SPLIT, (piece + 1) * steps // SPLIT, num_stages=STAGES):
        w = w_desc.load([n0, step * BK])
        x = x_desc.load([m0, step * BK])
        group = step * BK // 128
        w_scale = decode_scale(tl.load(sw_at + group * sw_k), SW_KIND)
        scale = tl.load(sx_at + group * sx_k) * w_scale
        if SWAP:
            acc += tl.dot(w, x.T) * scale[None, :]
        else:
            acc = add_scaled_ptx(acc, tl.dot(x, w.T), scale[:, None])
        if HALVES == 2:
            scale = tl.load(sx_low + group * sx_k) * w_scale
            low = add_scaled_ptx(low, tl.dot(x_desc.load([m0 + H, step * BK]), w.T), scale[:, None])
    mine = True
    if SPLIT > 1:
        mine, acc = add_slices(acc, part_ptr, ticket_ptr, tile, piece, SPLIT, BM * BN)
    if mine:
        store_tile(acc, y_ptr, bias_ptr, rm, rn, M, N, y_stride, BIAS, SWAP)
        if HALVES == 2:
            store_tile(low, y_ptr, bias_ptr, rm + H, rn, M, N, y_stride, BIAS, SWAP)


@triton.jit
def rescaled(
    x_desc, w_desc, sx_ptr, sw_at, M, K, sx_m, sx_k, sw_k, m0, n0, SW_KIND: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All of K with one set of sums, held in units of the scale of the group at hand: where the next begins they are
    multiplied by the old scale over the new, and products are added by the matrix unit itself.

    -> (sums, whether they are right). Scales outside of 2^-78 … 2^10, zero and NaN among them, could leave fp32's range
    on the way: the caller takes `promoted_tile` then. For 16-bit operands, which the matrix unit sums in fp32.
    """
    LEAST: tl.constexpr = (127 - 78) << 23  # bits of 2^-78; less, negative and NaN wrap to more than MOST
    MOST: tl.constexpr = (127 + 10) << 23
    sx_at = sx_ptr + tl.minimum(m0 + tl.arange(0, BM), M - 1).to(tl.int64) * sx_m
    unit = tl.load(sx_at) * decode_scale(tl.load(sw_at), SW_KIND)
    worst = tl.zeros((BM,), tl.uint32)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        w = w_desc.load([n0, step * BK])
        x = x_desc.load([m0, step * BK])
        group = step * BK // 128
        scale = tl.load(sx_at + group * sx_k) * decode_scale(tl.load(sw_at + group * sw_k), SW_KIND)
        if step * BK % 128 == 0:
            acc *= (unit / scale)[:, None]
        worst = tl.maximum(worst, scale.to(tl.uint32, bitcast=True) - LEAST)
        unit = scale
        acc = tl.dot(x, w.T, acc)
    return acc * unit[:, None], tl.max(worst, 0) <= MOST - LEAST


@triton.jit
def tma_tile(
    whole_desc, x_desc, w_desc, y_ptr, bias_ptr, sx_ptr, sw_ptr, part_ptr, ticket_ptr, M, N, K, y_stride, sx_m, sx_k,
    sw_n, sw_k, tile, SW_KIND: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, SWAP: tl.constexpr, HALVES: tl.constexpr, RESCALED: tl.constexpr, GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of `tma_kernel`."""
    pm, pn = tile_of(tile, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    m0 = pm * BM
    n0 = pn * BN
    sw_at = sw_ptr + (n0 // 128) * sw_n
    if RESCALED:
        acc, right = rescaled(
            whole_desc, w_desc, sx_ptr, sw_at, M, K, sx_m, sx_k, sw_k, m0, n0, SW_KIND, BM, BN, BK, STAGES
        )  # fmt: skip
        if right:
            rm, rn = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
            store_tile(acc, y_ptr, bias_ptr, rm, rn, M, N, y_stride, BIAS, SWAP)
        else:
            for half in tl.range(0, 2, num_stages=1):  # both at once would need more registers than there are
                promoted_tile(
                    x_desc, w_desc, y_ptr, bias_ptr, sx_ptr, sw_at, part_ptr, ticket_ptr, M, N, K, y_stride, sx_m, sx_k,
                    sw_k, tile, m0 + half * (BM // 2), n0, SW_KIND, BIAS, BM // 2, BN, BK, 1, SWAP, 1, STAGES,
                )  # fmt: skip
    else:
        promoted_tile(
            x_desc, w_desc, y_ptr, bias_ptr, sx_ptr, sw_at, part_ptr, ticket_ptr, M, N, K, y_stride, sx_m, sx_k, sw_k,
            tile, m0, n0, SW_KIND, BIAS, BM, BN, BK, SPLIT, SWAP, HALVES, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "sx_m", "sx_k", "sw_n"])
def tma_kernel(
    whole_desc,
    x_desc,
    w_desc,
    y_ptr,
    bias_ptr,
    sx_ptr,
    sw_ptr,
    part_ptr,
    ticket_ptr,
    M,
    N,
    K,
    y_stride,
    sx_m,
    sx_k,
    sw_n,
    sw_k,
    SW_KIND: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    HALVES: tl.constexpr,
    RESCALED: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """FP8 or 16-bit operands through block copies; scales fp32, one a row and 128 of K, one a 128x128 block.

    Copies past the edge of a matrix bring zeros, so any M, N and K do (K in whole 16-byte units). BN <= 128.
    PERSISTENT (SPLIT is 1): programs walk over tiles and the copies of the next tile overlap the store.
    x_desc: boxes of BM // HALVES rows. HALVES: 2 multiplies the upper and the lower half of the rows one after the
    other, so that a warp group holds the unscaled products of one half only and one copy of w serves both.
    RESCALED (16-bit operands, x_desc of half tiles, SPLIT 1): `rescaled` with whole_desc, boxes of BM rows, and
    `promoted_tile` where a tile's scales do not allow that. What is kept from tile to tile would spill there.
    """
    if PERSISTENT:
        tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1, disable_licm=RESCALED):
            tma_tile(
                whole_desc, x_desc, w_desc, y_ptr, bias_ptr, sx_ptr, sw_ptr, part_ptr, ticket_ptr, M, N, K, y_stride,
                sx_m, sx_k, sw_n, sw_k, tile, SW_KIND, BIAS, BM, BN, BK, SPLIT, SWAP, HALVES, RESCALED,
                GROUP_M, STAGES,
            )  # fmt: skip
    else:
        tma_tile(
            whole_desc, x_desc, w_desc, y_ptr, bias_ptr, sx_ptr, sw_ptr, part_ptr, ticket_ptr, M, N, K, y_stride,
            sx_m, sx_k, sw_n, sw_k, tl.program_id(0), SW_KIND, BIAS, BM, BN, BK, SPLIT, SWAP, HALVES, RESCALED,
            GROUP_M, STAGES,
        )  # fmt: skip
