"""Dense multiplication kernels: pointers everywhere, block copies (TMA) where the chip has them.

`y[m, n] = sum over K steps of (x . w) * x scale * w scale`, fp32 sums, one rounding at the end. Split-K is
deterministic: every slice writes its fp32 partial sums, and the program that arrives last adds them in order of
their number. Tickets count the arrivals; they must be zero before and are zero again after.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from .codec import decode, decode_scale
from .ptx import add_scaled_ptx
from .tiles import accumulate, count_steps, end_scales, scale_rows, tile_of


@triton.jit
def decode_kernel(q_ptr, y_ptr, total, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Bytes -> fp16 or bf16 codes without their scales: exact, for multiplications that read each byte often."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(q_ptr + at, mask=at < total, other=0)
    tl.store(y_ptr + at, decode(byte, KIND, y_ptr.dtype.element_ty), mask=at < total)


@triton.jit
def add_slices(acc, part_ptr, ticket_ptr, tile, piece, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    """Publish this slice's sums; the last of SPLIT programs gets the total. -> (is last, total).

    part: fp32 `[tiles, SPLIT, SIZE]`. The others return their own sums and False.
    """
    at = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
    base = part_ptr + tile.to(tl.int64) * (SPLIT * SIZE)
    tl.store(base + piece * SIZE + at, acc)
    tl.debug_barrier()  # all warps have stored before one of them says so
    last = tl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        acc = tl.load(base + at, cache_modifier=".cg")
        for i in range(1, SPLIT):
            acc += tl.load(base + i * SIZE + at, cache_modifier=".cg")
        tl.store(ticket_ptr + tile, 0)
    return last, acc


@triton.jit
def store_tile(
    acc,
    y_ptr,
    bias_ptr,
    rm,
    rn,
    M,
    N,
    y_stride,
    BIAS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Add the bias, round once, store what lies inside."""
    if BIAS:
        bias = tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)
        acc += bias[:, None] if SWAP else bias[None, :]
    rm = rm.to(tl.int64)
    if SWAP:
        at = y_ptr + rm[None, :] * y_stride + rn[:, None]
        mask = (rm < M)[None, :] & (rn < N)[:, None]
    else:
        at = y_ptr + rm[:, None] * y_stride + rn[None, :]
        mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "sx_m", "sx_k", "sw_n"])
def gemm_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    bias_ptr,
    sx_ptr,
    sw_ptr,
    x_level_ptr,
    w_level_ptr,
    part_ptr,
    ticket_ptr,
    M,
    N,
    K,
    x_stride,
    w_stride,
    y_stride,
    sx_m,
    sx_k,
    sw_n,
    sw_k,
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
    BIAS: tl.constexpr,
    X_LEVEL: tl.constexpr,
    W_LEVEL: tl.constexpr,
    LIFT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a [BM, BN] tile of y over one of SPLIT slices of K. Any format, block and shape."""
    tile = tl.program_id(0)
    piece = tl.program_id(1)
    pm, pn = tile_of(tile, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    x_row = tl.minimum(rm, M - 1).to(tl.int64)
    w_row = tl.minimum(rn, N - 1).to(tl.int64)
    sw_row = scale_rows(w_row, pn * BN, BN, W_ROWS, W_SCALE)
    steps = count_steps(K, SPAN, BK)
    acc = accumulate(
        x_ptr, x_row, x_stride, sx_ptr, sx_m, sx_k, w_ptr, w_row, w_stride, sw_ptr, sw_row, sw_n, sw_k,
        K, piece * steps // SPLIT, (piece + 1) * steps // SPLIT, X_KIND, W_KIND, X_SCALE, W_SCALE, SX_KIND, SW_KIND,
        X_GROUP, W_GROUP, SPAN, COMPUTE, BM, BN, BK, EVEN_K, SWAP, STAGES,
    )  # fmt: skip
    mine = True
    if SPLIT > 1:
        mine, acc = add_slices(acc, part_ptr, ticket_ptr, tile, piece, SPLIT, BM * BN)
    if mine:
        acc = end_scales(
            acc, sx_ptr, x_row, sx_m, sw_ptr, sw_row, sw_n, x_level_ptr, w_level_ptr,
            X_SCALE, W_SCALE, SX_KIND, SW_KIND, X_LEVEL, W_LEVEL, LIFT, SWAP,
        )  # fmt: skip
        store_tile(acc, y_ptr, bias_ptr, rm, rn, M, N, y_stride, BIAS, SWAP)


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

    -> (sums, whether they are right). Scales of a row that are zero, infinite, or more than 2^80 apart would leave
    fp32's range on the way, so the caller takes `promoted` then. For operands whose products fp32 sums are exact of.
    """
    sx_at = sx_ptr + tl.minimum(m0 + tl.arange(0, BM), M - 1).to(tl.int64) * sx_m
    unit = tl.load(sx_at) * decode_scale(tl.load(sw_at), SW_KIND)
    least, most = unit, unit
    acc = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        w = w_desc.load([n0, step * BK])
        x = x_desc.load([m0, step * BK])
        group = step * BK // 128
        scale = tl.load(sx_at + group * sx_k) * decode_scale(tl.load(sw_at + group * sw_k), SW_KIND)
        if step * BK % 128 == 0:
            acc *= (unit / scale)[:, None]
        least, most = tl.minimum(least, scale), tl.maximum(most, scale)
        unit = scale
        acc = tl.dot(x, w.T, acc)
    wrong = (least < 2.0**-100) | (most > least * 2.0**80)  # NaN is neither: its row is NaN either way
    return acc * unit[:, None], tl.sum(wrong.to(tl.int32), 0) == 0


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
    right = False
    if RESCALED:
        acc, right = rescaled(
            whole_desc, w_desc, sx_ptr, sw_at, M, K, sx_m, sx_k, sw_k, m0, n0, SW_KIND, BM, BN, BK, STAGES
        )
        rn = n0 + tl.arange(0, BN)
        if right:
            store_tile(acc, y_ptr, bias_ptr, m0 + tl.arange(0, BM), rn, M, N, y_stride, BIAS, SWAP)
    if not right:
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
    RESCALED (16-bit operands, HALVES 2, SPLIT 1): `rescaled` with whole_desc, boxes of BM rows, and `promoted_tile`
    where a tile's scales do not allow that.
    """
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0), num_stages=1):
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
