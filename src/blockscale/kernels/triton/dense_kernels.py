"""Multiplication without scales, and the decoder that takes them away: code times scale, where that is exact.

Where both operands are exact in 16 bits with their scales (`capability.common_dtype`), nothing is promoted: the matrix
unit sums 16-bit products in fp32. Hopper's 14-bit sums are those of fp8 products alone.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from .gemm_kernels import store_tile
from .tiles import fold_scale, group_index, load_operand, load_scales, shuffled, tile_of, times_levels


@triton.jit(do_not_specialize=["rows", "s_row"])
def decode_scaled_kernel(
    q_ptr,
    s_ptr,
    y_ptr,
    rows,
    K,
    q_stride,
    s_row,
    s_k,
    KIND: tl.constexpr,
    S_KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LIFT: tl.constexpr,
    EVEN_K: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
):
    """`y[r, k] = code[r, k] * scale[r // ROWS, k // GROUP]`, in y's dtype, which holds it. One program: [R, BK].

    ROWS: 0 where one scale serves all rows. LIFT: what decoding left to multiply by.
    """
    across = tl.cdiv(K, BK)
    r = tl.program_id(0) // across * R + tl.arange(0, R)
    k0 = tl.program_id(0) % across * BK
    row = tl.minimum(r, rows - 1).to(tl.int64)
    value = load_operand(q_ptr, row, q_stride, k0, K, KIND, y_ptr.dtype.element_ty, BK, EVEN_K)
    scale = load_scales(s_ptr, group_index(row, ROWS), s_row, s_k, k0, K, GROUP, BK, EVEN_K)
    value = fold_scale(value, scale, S_KIND)
    if LIFT != 1.0:
        value = (value * LIFT).to(y_ptr.dtype.element_ty)
    k = k0 + tl.arange(0, BK)
    mask = (r < rows)[:, None] if EVEN_K else (r < rows)[:, None] & (k < K)[None, :]
    tl.store(y_ptr + r.to(tl.int64)[:, None] * K + k[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def shuffle_kernel(x_ptr, y_ptr, rows, K, x_stride, R: tl.constexpr, BK: tl.constexpr):
    """16-bit x `[rows, K]` in the order of `tiles.shuffled`, K in whole 32. One program: [R, BK]."""
    across = tl.cdiv(K, BK)
    r = tl.program_id(0) // across * R + tl.arange(0, R)
    k = tl.program_id(0) % across * BK + tl.arange(0, BK)
    mask = (r < rows)[:, None] & (k < K)[None, :]
    row = r.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * x_stride + k[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + row * K + k[None, :], shuffled(x), mask=mask)


@triton.jit(do_not_specialize=["M"])
def dense_kernel(
    x_desc,
    w_desc,
    y_ptr,
    bias_ptr,
    x_level_ptr,
    w_level_ptr,
    M,
    N,
    K,
    y_stride,
    BIAS: tl.constexpr,
    X_LEVEL: tl.constexpr,
    W_LEVEL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """16-bit operands through block copies (TMA), one fp32 sum a result, any M, N and K in whole 16-byte units.

    One program a tile: persistent ones were not faster (bench/results/h100-small-blocks.md).
    """
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
        x = x_desc.load([pm * BM, step * BK])
        w = w_desc.load([pn * BN, step * BK])
        acc = tl.dot(x, w.T, acc)
    acc = times_levels(acc, x_level_ptr, w_level_ptr, X_LEVEL, W_LEVEL, 1.0)
    store_tile(
        acc, y_ptr, bias_ptr, pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), M, N, y_stride, BIAS, False
    )
