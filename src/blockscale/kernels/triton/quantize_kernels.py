"""Kernels that quantize groups of a row, alone or fused with what comes before. `quantize.py` launches them.

Constexprs that recur are explained in `quantize_parts`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: SIM102, SIM108 (branches on constexprs are chosen when a kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl

from .quantize_parts import (
    divide_by,
    finite_or_nan,
    inside,
    inverse_pow2,
    products,
    quantize_groups,
    scale_of,
    store_codes,
    stored_scale,
)


@triton.jit(do_not_specialize=["level_row", "rows", "groups", "padded_rows", "padded_groups", "tickets"])
def group_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    level_ptr,
    level_row,
    weight_ptr,
    rows,
    cols,
    groups,
    x_row,
    q_row,
    s_r,
    s_g,
    padded_rows,
    padded_groups,
    floor,
    clamp,
    ticket_ptr,
    tickets,
    SWIGLU: tl.constexpr,
    CLAMP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GROUP: tl.constexpr,
    ELEMENT: tl.constexpr,
    LIMIT: tl.constexpr,
    ROUNDING: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    OUT: tl.constexpr,
    DIVIDE: tl.constexpr,
    PACK4: tl.constexpr,
    EVEN: tl.constexpr,
    SHUFFLED: tl.constexpr,
    TICKETS: tl.constexpr,
    FEW: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    """1xGROUP groups of `x: [rows, cols]`, or with SWIGLU of silu(gate) * up with `x: [rows, 2 cols]`.

    One program: R rows by G groups; C is GROUP rounded up to a power of two. FEW: rows have a grid axis of their own,
    which saves a division (and holds 65535 of them). TICKETS: zero the tickets that the
    split-K multiplication after this kernel counts with, which saves it a launch of its own.
    """
    if FEW:
        row_tile = tl.program_id(1)
        column_tile = tl.program_id(0)
    else:
        across = tl.cdiv(padded_groups, G)
        row_tile = tl.program_id(0) // across
        column_tile = tl.program_id(0) % across
    r = row_tile * R + tl.arange(0, R)
    g = column_tile * G + tl.arange(0, G)
    c = tl.arange(0, C)
    if TICKETS > 0:
        if (row_tile == 0) & (column_tile == 0):
            for i in range(0, tickets, TICKETS):
                t = i + tl.arange(0, TICKETS)
                tl.store(ticket_ptr + t, tl.zeros([TICKETS], tl.int32), mask=t < tickets)
    col = g[None, :, None] * GROUP + c[None, None, :]
    row = r.to(tl.int64)[:, None, None]
    mask = inside(r, g, c, rows, cols, groups, GROUP, EVEN)
    x = tl.load(x_ptr + row * x_row + col, mask=mask, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(x_ptr + row * x_row + cols + col, mask=mask, other=0.0).to(tl.float32)
        if CLAMP:  # comparisons, not minimum: a NaN must stay one
            x = tl.where(x > clamp, clamp, x)
            up = tl.where(up > clamp, clamp, tl.where(up < -clamp, -clamp, up))
        x = x / (1.0 + tl.exp(-x)) * up  # rounded to the dtype below: last bits of fp32 do not matter
        if WEIGHTED:
            x = x * tl.load(weight_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None, None]
        # What the unfused pair writes out in between.
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        x = tl.where(mask, x, 0.0)
    quantize_groups(
        x, q_ptr, s_ptr, r, g, c, rows, cols, groups, q_row, s_r, s_g, padded_rows, padded_groups, floor, level_ptr,
        level_row, GROUP, ELEMENT, LIMIT, ROUNDING, MAX_EXPONENT, SCALE_KIND, OUT, DIVIDE, PACK4, EVEN, SHUFFLED,
    )  # fmt: skip


@triton.jit
def few_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    ticket_ptr,
    tickets,
    rows,
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
    TICKETS: tl.constexpr,
    C: tl.constexpr,
):
    """`group_kernel` for few rows of whole groups of C elements: one warp a group, grid (groups, padded rows).

    A kernel this short waits for its own instructions: every line of code that is not there is a tenth of its time.
    """
    g = tl.program_id(0)
    r = tl.program_id(1)
    at = g * C + tl.arange(0, C)
    PRODUCT: tl.constexpr = OUT == "product" or OUT == "native product"
    if not PRODUCT:
        s_ptr += r * s_r + g * s_g
    if r < rows:
        x = finite_or_nan(tl.load(x_ptr + r * x_row + at).to(tl.float32))
        scale = scale_of(tl.max(tl.abs(x), axis=0), floor, LIMIT, ROUNDING, MAX_EXPONENT, DIVIDE)
        if ROUNDING == "none":
            scaled = divide_by(x, scale, DIVIDE)
        else:
            scaled = x * inverse_pow2(scale)
        if PRODUCT:
            value = products(scaled, scale, ELEMENT, OUT)
            tl.store(q_ptr + r * q_row + at, value.to(q_ptr.dtype.element_ty))
        else:
            store_codes(q_ptr + r * q_row + at, scaled, None, ELEMENT, OUT)
            tl.store(s_ptr, stored_scale(scale, SCALE_KIND, OUT))
    elif not PRODUCT:
        tl.store(s_ptr, tl.zeros([], s_ptr.dtype.element_ty))
    if TICKETS > 0:
        if (r == 0) & (g == 0):
            for i in range(0, tickets, TICKETS):
                t = i + tl.arange(0, TICKETS)
                tl.store(ticket_ptr + t, tl.zeros([TICKETS], tl.int32), mask=t < tickets)


@triton.jit(do_not_specialize=["rows", "groups", "padded_rows", "padded_groups"])
def rmsnorm_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    weight_ptr,
    rows,
    cols,
    groups,
    x_row,
    q_row,
    s_r,
    s_g,
    padded_rows,
    padded_groups,
    floor,
    eps,
    GROUP: tl.constexpr,
    ELEMENT: tl.constexpr,
    LIMIT: tl.constexpr,
    ROUNDING: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    OUT: tl.constexpr,
    DIVIDE: tl.constexpr,
    PACK4: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
):
    """`x * rsqrt(mean(x^2) + eps) * weight`, then 1xGROUP groups of it. One program: one row, G groups at a time.

    WHOLE: G covers the row, which is read once and kept.
    """
    r = tl.program_id(0) + tl.arange(0, 1)
    c = tl.arange(0, C)
    row = r.to(tl.int64)[:, None, None]
    g = tl.arange(0, G)
    held = tl.load(
        x_ptr + row * x_row + (g[None, :, None] * GROUP + c[None, None, :]),
        mask=inside(r, g, c, rows, cols, groups, GROUP, EVEN),
        other=0.0,
    ).to(tl.float32)
    total = held * held
    if not WHOLE:
        for first in range(G, groups, G):
            g = first + tl.arange(0, G)
            col = g[None, :, None] * GROUP + c[None, None, :]
            mask = inside(r, g, c, rows, cols, groups, GROUP, EVEN)
            x = tl.load(x_ptr + row * x_row + col, mask=mask, other=0.0).to(tl.float32)
            total += x * x
    mean = tl.sum(tl.sum(total, axis=2), axis=1)[:, None, None] / cols
    # Intel's correctly rounded square root needs fp64, which DG2 lacks, and no byte of this depends on the last bit.
    root = tl.sqrt(mean + eps) if DIVIDE == "ieee" else tl.sqrt_rn(mean + eps)
    inverse = tl.div_rn(1.0, root)
    for first in range(0, padded_groups, G):
        g = first + tl.arange(0, G)
        col = g[None, :, None] * GROUP + c[None, None, :]
        mask = inside(r, g, c, rows, cols, groups, GROUP, EVEN)
        if WHOLE:
            x = held
        else:
            x = tl.load(x_ptr + row * x_row + col, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=(col < cols) & (c < GROUP)[None, None, :], other=0.0)
        x = (x * inverse * weight.to(tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)
        quantize_groups(
            x, q_ptr, s_ptr, r, g, c, rows, cols, groups, q_row, s_r, s_g, padded_rows, padded_groups, floor, s_ptr,
            0, GROUP, ELEMENT, LIMIT, ROUNDING, MAX_EXPONENT, SCALE_KIND, OUT, DIVIDE, PACK4, EVEN, False,
        )  # fmt: skip
