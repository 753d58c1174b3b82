"""What all kernels that quantize share: amax to scale, division, encoding. Jit functions, no kernels.

All of them follow `reference.quantize` to the byte: IEEE divisions, round to nearest even, the sign of zero kept,
non-finite values left out of amax and stored as NaN. Constexprs that recur:

ELEMENT, LIMIT: element name and its largest magnitude. ROUNDING, MAX_EXPONENT: how a scale is made from amax.
SCALE_KIND: how it is stored: "float" (fp32), "e8m0" or "e4m3" (bytes). OUT: "codec" stores bytes that integer code
made, "native" lets the chip cast, "fnuz" stores E4M3FNUZ bytes of E4M3FN values beside doubled scales, "value" stores
what the codes stand for as fp16 or bf16, for a multiplication that would decode them again in every tile, "product"
stores code times scale and no scale ("native product": the chip casts). SHUFFLED: those in the order of
`tiles.shuffled`.
DIVIDE: "ieee"; "fma" where the target fuses multiply-adds: the same result in a third of the instructions; "rcp" on
NVIDIA for what has 16 bits: without the branches of a division.
PACK4: scale bytes of four groups share a word ("ue8m0x4").
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: SIM108 (branches on constexprs are chosen when a kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl

from .codec import decode, encode, fn_to_fnuz, pack_fp4, pow2, pow2_exponent
from .ptx import reciprocal_ptx
from .tiles import shuffled


@triton.jit
def finite_or_nan(x):
    """fp32 with infinities made NaN, everything else as it was, -0 too: one instruction (inf * 0 is NaN)."""
    return tl.fma(x, 0.0, x)


@triton.jit
def divide(x, scale, DIVIDE: tl.constexpr):
    """`x / scale`, correctly rounded, of tensors of one shape.

    All but "ieee" is Markstein's correction of x * (1 / scale): exact as long as nothing underflows, and with scales
    above 2^-80 (`quantize.py` checks the floor) only quotients far below the smallest code do. Signs are arranged so
    that -0 stays -0.
    """
    if DIVIDE == "ieee":
        quotient = tl.div_rn(x, scale)
    else:
        reciprocal = tl.div_rn(1.0, scale)
        quotient = x * reciprocal
        excess = tl.fma(quotient, scale, x * -1.0)
        quotient = tl.fma(excess, reciprocal * -1.0, quotient)
    return quotient


@triton.jit
def divide_by(x, scale, DIVIDE: tl.constexpr):
    """`x / scale`, correctly rounded, with one scale for all of x."""
    if DIVIDE == "ieee":
        quotient = tl.div_rn(x, tl.zeros_like(x) + scale)
    else:
        reciprocal = reciprocal_ptx(scale) if DIVIDE == "rcp" else tl.div_rn(1.0, scale)
        quotient = x * reciprocal
        excess = tl.fma(quotient, tl.zeros_like(x) + scale, x * -1.0)
        quotient = tl.fma(excess, tl.zeros_like(x) + reciprocal * -1.0, quotient)
    return quotient


@triton.jit
def divide_groups(x, scale, DIVIDE: tl.constexpr):
    """`x / scale`, correctly rounded: x [R, G, C], scale [R, G] fp32; the reciprocal is taken once a group."""
    wide = tl.broadcast_to(scale[:, :, None], x.shape)
    if DIVIDE == "ieee":
        quotient = tl.div_rn(x, wide)
    else:
        reciprocal = reciprocal_ptx(scale) if DIVIDE == "rcp" else tl.div_rn(1.0, scale)
        negative = tl.broadcast_to((reciprocal * -1.0)[:, :, None], x.shape)
        quotient = x * reciprocal[:, :, None]
        excess = tl.fma(quotient, wide, x * -1.0)
        quotient = tl.fma(excess, negative, quotient)
    return quotient


@triton.jit
def inverse_pow2(scale):
    """`1 / scale` of powers of two, 2^-127 … 2^127, by their bits."""
    exponent = scale.to(tl.int32, bitcast=True) >> 23  # 2^-127, a subnormal, gives 0
    bits = tl.where(exponent == 254, 0x00400000, (254 - exponent) << 23)
    return bits.to(tl.float32, bitcast=True)


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
def products(scaled, scale, ELEMENT: tl.constexpr, OUT: tl.constexpr):
    """fp32 `scaled` rounded to ELEMENT, times `scale`, which broadcasts."""
    if OUT == "native product":
        value = scaled.to(tl.float8e4nv).to(tl.float32)
    else:
        value = decode(encode(scaled, ELEMENT), ELEMENT, tl.float32)
    return value * scale


@triton.jit
def scale_of(
    amax, floor, LIMIT: tl.constexpr, ROUNDING: tl.constexpr, MAX_EXPONENT: tl.constexpr, DIVIDE: tl.constexpr
):
    """Scale of blocks with this amax, fp32 (formats with one level of scales)."""
    amax = tl.maximum(amax, floor)
    if ROUNDING == "none":
        scale = divide(amax, tl.zeros_like(amax) + LIMIT, DIVIDE)
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
    level_row,
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
):
    """Quantize and store fp32 `x: [R, G, C]`, rows `r`, groups `g`, elements `c` of a group; zeros outside.

    level: second-level scales, level_row apart from row to row (0: one for all).
    """
    PRODUCT: tl.constexpr = OUT == "product" or OUT == "native product"
    x = finite_or_nan(x)
    amax = tl.max(tl.abs(x), axis=2)  # max passes over NaN
    if ELEMENT == "fp4":
        whole = tl.min((x == x).to(tl.int32), axis=2) != 0  # FP4 has no NaN: the block's scale says it
    if SCALE_KIND == "e4m3":
        level = tl.load(level_ptr + r * level_row, mask=r < rows, other=1.0)[:, None]
        ratio = tl.minimum(tl.div_rn(tl.div_rn(amax, LIMIT), level), 448.0)
        stored = tl.where(whole, encode(ratio, "fp8"), 0x7F).to(tl.uint8)
        scale = decode(stored, "fp8", tl.float32)
        step = scale * level
        scaled = tl.where((step > 0)[:, :, None], divide_groups(x, step, "ieee"), 0.0)
    else:
        scale = scale_of(amax, floor, LIMIT, ROUNDING, MAX_EXPONENT, DIVIDE)
        stored = stored_scale(scale, SCALE_KIND, OUT)
        if ROUNDING == "none":
            scaled = divide_groups(x, scale, DIVIDE)
        else:
            scaled = x * inverse_pow2(scale)[:, :, None]  # exact
        if ELEMENT == "fp4":
            if PRODUCT:
                scale = tl.where(whole, scale, float("nan"))
            else:
                stored = tl.where(whole, stored, 255).to(tl.uint8)

    col = g[None, :, None] * GROUP + c[None, None, :]
    row = r.to(tl.int64)[:, None, None]
    if PRODUCT:
        if ELEMENT == "fp4":
            scaled = tl.where(whole[:, :, None], scaled, 0.0)
        value = products(scaled, scale[:, :, None], ELEMENT, OUT).to(q_ptr.dtype.element_ty)
        if SHUFFLED:
            value = tl.reshape(shuffled(tl.reshape(value, (x.shape[0], x.shape[1] * x.shape[2]))), x.shape)
        tl.store(q_ptr + row * q_row + col, value, mask=inside(r, g, c, rows, cols, groups, GROUP, EVEN))
    elif ELEMENT == "fp4":
        byte = pack_fp4(encode(tl.where(whole[:, :, None], scaled, 0.0), "fp4"))
        half = g[None, :, None] * (GROUP // 2) + tl.arange(0, c.shape[0] // 2)[None, None, :]
        within = (tl.arange(0, c.shape[0] // 2) < GROUP // 2)[None, None, :]
        tl.store(q_ptr + row * q_row + half, byte, mask=(row < rows) & (half < cols // 2) & within)
    else:
        store_codes(q_ptr + row * q_row + col, scaled, inside(r, g, c, rows, cols, groups, GROUP, EVEN), ELEMENT, OUT)

    if not PRODUCT:
        real = (r < rows)[:, None] & (g < groups)[None, :]
        stored = tl.where(real, stored, 0).to(stored.dtype)
        if PACK4:
            at = ((g // 4)[None, :] * s_g + r.to(tl.int64)[:, None]) * 4 + (g % 4)[None, :]
        else:
            at = r.to(tl.int64)[:, None] * s_r + g[None, :].to(tl.int64) * s_g
        tl.store(s_ptr + at, stored, mask=(r < padded_rows)[:, None] & (g < padded_groups)[None, :])
