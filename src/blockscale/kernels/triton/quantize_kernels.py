"""Triton kernels that quantize: tiles of groups, whole blocks, whole tensors. `quantize.py` launches them.

All of them follow `reference.quantize` to the byte: IEEE divisions, round to nearest even, the sign of zero kept,
non-finite values left out of amax and stored as NaN. Constexprs that recur:

ELEMENT, LIMIT: element name and its largest magnitude. ROUNDING, MAX_EXPONENT: how a scale is made from amax.
SCALE_KIND: how it is stored: "float" (fp32), "e8m0" or "e4m3" (bytes). OUT: "codec" stores bytes that integer code
made, "native" lets the chip cast, "fnuz" stores E4M3FNUZ bytes of E4M3FN values beside doubled scales, "value" stores
what the codes stand for as fp16 or bf16, for a multiplication that would decode them again in every tile.
DIVIDE: "ieee", or "fma" where the target fuses multiply-adds: the same result in a third of the instructions.
PACK4: scale bytes of four groups share a word ("ue8m0x4").
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: SIM102, SIM108 (branches on constexprs are chosen when a kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl

from .codec import decode, decode_scale, encode, fn_to_fnuz, pack_fp4, pow2, pow2_exponent


@triton.jit
def finite_or_nan(x):
    """fp32 with infinities made NaN, everything else as it was, -0 too: one instruction (inf * 0 is NaN)."""
    return tl.fma(x, 0.0, x)


@triton.jit
def divide(x, scale, DIVIDE: tl.constexpr):
    """`x / scale`, correctly rounded, of tensors of one shape, or with a scalar constant as `scale`.

    "fma" is Markstein's correction of x * (1 / scale): exact as long as nothing underflows, and with scales above
    2^-80 (`quantize.py` checks the floor) only quotients far below the smallest code do. Signs are arranged so that
    -0 stays -0.
    """
    if DIVIDE == "fma":
        reciprocal = tl.div_rn(1.0, scale)
        quotient = x * reciprocal
        excess = tl.fma(quotient, scale, x * -1.0)
        quotient = tl.fma(excess, reciprocal * -1.0, quotient)
    else:
        quotient = tl.div_rn(x, scale)
    return quotient


@triton.jit
def divide_groups(x, scale, DIVIDE: tl.constexpr):
    """`x / scale`, correctly rounded: x [R, G, C], scale [R, G] fp32; the reciprocal is taken once a group."""
    wide = tl.broadcast_to(scale[:, :, None], x.shape)
    if DIVIDE == "fma":
        reciprocal = tl.div_rn(1.0, scale)
        negative = tl.broadcast_to((reciprocal * -1.0)[:, :, None], x.shape)
        quotient = x * reciprocal[:, :, None]
        excess = tl.fma(quotient, wide, x * -1.0)
        quotient = tl.fma(excess, negative, quotient)
    else:
        quotient = tl.div_rn(x, wide)
    return quotient


@triton.jit
def store_codes(ptr, scaled, mask, ELEMENT: tl.constexpr, OUT: tl.constexpr):
    """Encode fp32 `scaled` (any shape but FP4, NaN for what was not finite) and store it at `ptr`."""
    if OUT == "native":
        code = scaled.to(ptr.dtype.element_ty)  # saturates, and gives NaN its one code
    else:
        code = encode(scaled, ELEMENT)
        if OUT == "fnuz":
            code = fn_to_fnuz(code)
        elif OUT == "value":
            code = decode(code, ELEMENT, ptr.dtype.element_ty)
    tl.store(ptr, code, mask=mask)


@triton.jit
def scale_of(
    amax, floor, LIMIT: tl.constexpr, ROUNDING: tl.constexpr, MAX_EXPONENT: tl.constexpr, DIVIDE: tl.constexpr
):
    """Scale of blocks with this amax, fp32 (formats with one level of scales)."""
    amax = tl.maximum(amax, floor)
    if ROUNDING == "none":
        scale = divide(amax, tl.full(amax.shape, LIMIT, tl.float32), DIVIDE)
    else:
        scale = pow2(pow2_exponent(amax, LIMIT, ROUNDING, MAX_EXPONENT))
    return scale


@triton.jit
def stored_scale(scale, SCALE_KIND: tl.constexpr, OUT: tl.constexpr):
    """fp32 scale -> what is stored: fp32 (doubled for "fnuz") or the E8M0 byte of a power of two."""
    if SCALE_KIND == "e8m0":
        stored = (scale.to(tl.uint32, bitcast=True) >> 23).to(tl.uint8)  # 2^-127, the one subnormal, gives 0: right
    elif OUT == "fnuz":
        stored = scale * 2.0
    else:
        stored = scale
    return stored


@triton.jit
def inside(r, g, c, rows, cols, groups, GROUP: tl.constexpr, EVEN: tl.constexpr):
    """Mask [R, G, C] of elements that exist. EVEN: all groups are whole and a power of two wide."""
    if EVEN:
        mask = (r < rows)[:, None, None] & (g < groups)[None, :, None] & (c < GROUP)[None, None, :]
    else:
        col = g[None, :, None] * GROUP + c[None, None, :]
        mask = (r < rows)[:, None, None] & (col < cols) & (c < GROUP)[None, None, :]
    return mask


@triton.jit
def quantize_groups(
    x,
    q_ptr,
    s_ptr,
    r,
    g,
    c,
    rows,
    cols,
    groups,
    q_row,
    s_r,
    s_g,
    padded_rows,
    padded_groups,
    floor,
    level_ptr,
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
):
    """Quantize and store fp32 `x: [R, G, C]`, rows `r`, groups `g`, elements `c` of a group; zeros outside."""
    x = finite_or_nan(x)
    amax = tl.max(tl.abs(x), axis=2)  # max passes over NaN
    if ELEMENT == "fp4":
        whole = tl.min((x == x).to(tl.int32), axis=2) != 0  # FP4 has no NaN: the block's scale says it
    if SCALE_KIND == "e4m3":
        level = tl.load(level_ptr)
        ratio = tl.minimum(tl.div_rn(tl.div_rn(amax, LIMIT), level), 448.0)
        stored = tl.where(whole, encode(ratio, "fp8"), 0x7F).to(tl.uint8)
        step = decode(stored, "fp8", tl.float32) * level
        scaled = tl.where((step > 0)[:, :, None], divide_groups(x, step, "ieee"), 0.0)
    else:
        scale = scale_of(amax, floor, LIMIT, ROUNDING, MAX_EXPONENT, DIVIDE)
        stored = stored_scale(scale, SCALE_KIND, OUT)
        if ROUNDING == "none":
            scaled = divide_groups(x, scale, DIVIDE)
        else:
            scaled = x * tl.div_rn(1.0, scale)[:, :, None]  # a power of two: exact
        if ELEMENT == "fp4":
            stored = tl.where(whole, stored, 255).to(tl.uint8)

    col = g[None, :, None] * GROUP + c[None, None, :]
    row = r.to(tl.int64)[:, None, None]
    if ELEMENT == "fp4":
        byte = pack_fp4(encode(tl.where(whole[:, :, None], scaled, 0.0), "fp4"))
        half = g[None, :, None] * (GROUP // 2) + tl.arange(0, c.shape[0] // 2)[None, None, :]
        within = (tl.arange(0, c.shape[0] // 2) < GROUP // 2)[None, None, :]
        tl.store(q_ptr + row * q_row + half, byte, mask=(row < rows) & (half < cols // 2) & within)
    else:
        store_codes(q_ptr + row * q_row + col, scaled, inside(r, g, c, rows, cols, groups, GROUP, EVEN), ELEMENT, OUT)

    real = (r < rows)[:, None] & (g < groups)[None, :]
    stored = tl.where(real, stored, 0).to(stored.dtype)
    if PACK4:
        at = ((g // 4)[None, :] * s_g + r.to(tl.int64)[:, None]) * 4 + (g % 4)[None, :]
    else:
        at = r.to(tl.int64)[:, None] * s_r + g[None, :].to(tl.int64) * s_g
    tl.store(s_ptr + at, stored, mask=(r < padded_rows)[:, None] & (g < padded_groups)[None, :])


@triton.jit
def group_kernel(
    x_ptr,
    q_ptr,
    s_ptr,
    level_ptr,
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
        GROUP, ELEMENT, LIMIT, ROUNDING, MAX_EXPONENT, SCALE_KIND, OUT, DIVIDE, PACK4, EVEN,
    )  # fmt: skip


@triton.jit
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
    # Intel's correctly rounded square root needs fp64, which DG2 lacks; its other one is as good where no byte hangs on it.
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
            GROUP, ELEMENT, LIMIT, ROUNDING, MAX_EXPONENT, SCALE_KIND, OUT, DIVIDE, PACK4, EVEN,
        )  # fmt: skip


@triton.jit
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


@triton.jit
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


@triton.jit
def level_kernel(part_ptr, parts, level_ptr, DIVISOR: tl.constexpr, PARTS: tl.constexpr):
    """NVFP4's global scale: amax / (448 * 6), or 1 for a matrix of zeros."""
    i = tl.arange(0, PARTS)
    level = tl.div_rn(tl.max(tl.load(part_ptr + i, mask=i < parts, other=0.0), axis=0), DIVISOR)
    tl.store(level_ptr, tl.where(level > 0, level, 1.0))


@triton.jit
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
