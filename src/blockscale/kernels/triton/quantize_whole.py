"""Kernels that quantize blocks of rows, whole tensors, and by given scales. `quantize.py` launches them.

Constexprs that recur are explained in `quantize_parts`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: SIM108 (branches on constexprs are chosen when a kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl

from .codec import decode_scale
from .quantize_parts import divide, finite_or_nan, scale_of, store_codes, stored_scale


@triton.jit(do_not_specialize=["rows", "block_rows", "s_r", "s_g"])
def block_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    rows,
    cols,
    block_rows,
    block_cols,
    x_row,
    q_row,
    s_r,
    s_g,
    floor,
    ELEMENT: tl.constexpr,
    LIMIT: tl.constexpr,
    ROUNDING: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    OUT: tl.constexpr,
    DIVIDE: tl.constexpr,
    PACK4: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Blocks of any size, whole rows included: one program a block, in chunks of [R, C], read twice."""
    across = tl.cdiv(cols, block_cols)
    block_r = tl.program_id(0) // across
    block_c = tl.program_id(0) % across
    last_r = tl.minimum((block_r + 1) * block_rows, rows)
    last_c = tl.minimum((block_c + 1) * block_cols, cols)
    amax = tl.full([], 0.0, tl.float32)
    for r0 in range(block_r * block_rows, last_r, R):
        r = (r0 + tl.arange(0, R)).to(tl.int64)[:, None]
        for c0 in range(block_c * block_cols, last_c, C):
            c = c0 + tl.arange(0, C)[None, :]
            x = tl.load(x_ptr + r * x_row + c, mask=(r < last_r) & (c < last_c), other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(tl.max(tl.abs(finite_or_nan(x)), axis=1), axis=0))
    scale = scale_of(amax, floor, LIMIT, ROUNDING, MAX_EXPONENT, "ieee")
    if PACK4:
        at = (block_c // 4 * s_g + block_r) * 4 + block_c % 4
    else:
        at = block_r * s_r + block_c * s_g
    tl.store(s_ptr + at, stored_scale(scale, SCALE_KIND, OUT))
    for r0 in range(block_r * block_rows, last_r, R):
        r = (r0 + tl.arange(0, R)).to(tl.int64)[:, None]
        for c0 in range(block_c * block_cols, last_c, C):
            c = c0 + tl.arange(0, C)[None, :]
            mask = (r < last_r) & (c < last_c)
            x = tl.load(x_ptr + r * x_row + c, mask=mask, other=0.0).to(tl.float32)
            scaled = divide(finite_or_nan(x), tl.zeros([R, C], tl.float32) + scale, DIVIDE)
            store_codes(q_ptr + r * q_row + c, scaled, mask, ELEMENT, OUT)


@triton.jit(do_not_specialize=["rows"])
def amax_kernel(x_ptr, part_ptr, rows, cols, x_row, C: tl.constexpr):
    """Largest finite |x| of every num_programs-th row -> `part[program]`; no atomics, so no order to depend on."""
    amax = tl.zeros([C], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        for c0 in range(0, cols, C):
            c = c0 + tl.arange(0, C)
            at = (tl.zeros([C], tl.int64) + row) * x_row + c
            x = tl.load(x_ptr + at, mask=c < cols, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.abs(finite_or_nan(x)))
    tl.store(part_ptr + tl.program_id(0), tl.max(amax, axis=0))


@triton.jit(do_not_specialize=["parts"])
def level_kernel(part_ptr, parts, level_ptr, DIVISOR: tl.constexpr, PARTS: tl.constexpr):
    """NVFP4's global scale: amax / (448 * 6), or 1 for a matrix of zeros."""
    i = tl.arange(0, PARTS)
    level = tl.div_rn(tl.max(tl.load(part_ptr + i, mask=i < parts, other=0.0), axis=0), DIVISOR)
    tl.store(level_ptr, tl.where(level > 0, level, 1.0))


@triton.jit(do_not_specialize=["parts", "rows", "s_r", "s_g", "block_rows", "block_cols"])
def tensor_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    part_ptr,
    parts,
    rows,
    cols,
    x_row,
    q_row,
    s_r,
    s_g,
    block_rows,
    block_cols,
    floor,
    ELEMENT: tl.constexpr,
    LIMIT: tl.constexpr,
    ROUNDING: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    OUT: tl.constexpr,
    DIVIDE: tl.constexpr,
    STATIC: tl.constexpr,
    PARTS: tl.constexpr,
    C: tl.constexpr,
):
    """Divide by scales that exist: a given grid (STATIC), or one for the tensor from `amax_kernel`'s parts."""
    across = tl.cdiv(cols, C)
    row = (tl.program_id(0) // across).to(tl.int64)
    c = tl.program_id(0) % across * C + tl.arange(0, C)
    mask = c < cols
    x = tl.load(x_ptr + row * x_row + c, mask=mask, other=0.0).to(tl.float32)
    if STATIC:
        at = (row // block_rows) * s_r + (c // block_cols) * s_g
        scale = decode_scale(tl.load(s_ptr + at, mask=mask, other=1), SCALE_KIND)
    else:
        i = tl.arange(0, PARTS)
        amax = tl.max(tl.load(part_ptr + i, mask=i < parts, other=0.0), axis=0)
        single = scale_of(amax, floor, LIMIT, ROUNDING, MAX_EXPONENT, "ieee")
        if tl.program_id(0) == 0:
            tl.store(s_ptr, stored_scale(single, SCALE_KIND, OUT))
        scale = tl.zeros([C], tl.float32) + single
    store_codes(q_ptr + row * q_row + c, divide(finite_or_nan(x), scale, DIVIDE), mask, ELEMENT, OUT)
