"""Dense multiplication by pointers, everywhere; `tma_kernels` has block copies.

`y[m, n] = sum over K steps of (x . w) * x scale * w scale`, fp32 sums, one rounding at the end. Split-K is
deterministic: every slice writes its fp32 partial sums, and the program that arrives last adds them in order of
their number. Tickets count the arrivals; they must be zero before and are zero again after.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from .codec import decode
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
    SHUFFLED: tl.constexpr,
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
        X_GROUP, W_GROUP, SPAN, COMPUTE, BM, BN, BK, EVEN_K, SWAP, SHUFFLED, STAGES,
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
