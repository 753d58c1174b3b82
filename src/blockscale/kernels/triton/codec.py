"""8- and 4-bit floats as integers: encode and decode inside Triton without an fp8 type.

Chips without FP8 instructions reject the fp8 types outright, and where casts exist some are wrong (no saturation,
double rounding). Integer operations are the same everywhere, so these are bit-exact on every target. An `ELEMENT`
is the name of a `formats.Element`: "fp8" (E4M3FN), "fp8e5m2", "fp8fnuz" (E4M3FNUZ), "fp4" (E2M1).

Sources: OCP OFP8 1.0 (E4M3, E5M2), OCP MX 1.0 (E2M1, E8M0); E4M3FNUZ as in LLVM's APFloat.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: SIM108, SIM300, RUF005 (branches on constexprs are chosen when a kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode(x, ELEMENT: tl.constexpr):
    """fp32 -> uint8 codes: round to nearest even, saturate at the element's max, NaN and infinity to its NaN code.

    FP4 codes are 0 … 15, one a byte; FP4 has no NaN, so NaN becomes +0 (the block's scale says NaN instead).
    """
    if ELEMENT == "fp8":
        code = _encode_fp8(x, BIAS=7, MANTISSA=3, MAX_CODE=0x7E, NAN=0x7F, SIGNED_ZERO=True)
    elif ELEMENT == "fp8e5m2":
        code = _encode_fp8(x, BIAS=15, MANTISSA=2, MAX_CODE=0x7B, NAN=0x7F, SIGNED_ZERO=True)
    elif ELEMENT == "fp8fnuz":
        code = _encode_fp8(x, BIAS=8, MANTISSA=3, MAX_CODE=0x7F, NAN=0x80, SIGNED_ZERO=False)
    else:
        tl.static_assert(ELEMENT == "fp4", "unknown element")
        code = _encode_e2m1(x)
    return code


@triton.jit
def decode(byte, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 codes -> DTYPE (fp16, bf16 or fp32), exactly; NaN codes become NaN.

    A float's exponent and mantissa, moved to the same place of a wider float, are the same number times a power of
    two, subnormals included: one multiplication repairs the bias.
    """
    tl.static_assert((DTYPE == tl.float16 or DTYPE == tl.bfloat16) or DTYPE == tl.float32, "fp16, bf16 or fp32")
    if DTYPE == tl.bfloat16:
        value = _decode_bf16(byte, ELEMENT)
    else:
        value = _decode_fp16(byte, ELEMENT).to(DTYPE)
    return value


@triton.jit
def decode_e8m0(byte):
    """E8M0 bytes -> fp32: 2^(byte - 127); 0 is 2^-127, an fp32 subnormal, and 255 is NaN."""
    bits = byte.to(tl.uint32) << 23
    bits = tl.where(byte == 0, 0x00400000, bits)
    bits = tl.where(byte == 255, 0x7FC00000, bits)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_as_bf16(byte):
    """`decode_e8m0` to bf16, which has the same exponents, in fewer instructions."""
    bits = tl.maximum(byte.to(tl.uint16) << 7, 0x0040)
    return tl.where(byte == 255, 0x7FC0, bits).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def decode_scale(scale, KIND: tl.constexpr):
    """Stored scales -> fp32. KIND: "e8m0" or "e4m3" bytes as uint8; "float" for fp32, bf16 and fp16 values."""
    if KIND == "e8m0":
        value = decode_e8m0(scale)
    elif KIND == "e4m3":
        value = decode(scale, "fp8", tl.float32)
    else:
        value = scale.to(tl.float32)
    return value


@triton.jit
def pack_fp4(code):
    """`[..., 2 n]` codes -> `[..., n]` bytes, the even column in the low nibble."""
    low, high = tl.split(tl.reshape(code, code.shape[:-1] + [code.shape[-1] // 2, 2]))
    return low | (high << 4)


@triton.jit
def unpack_fp4(byte):
    """`[rows, n]` bytes -> `[rows, 2 n]` codes."""
    return tl.reshape(tl.join(byte & 15, byte >> 4), (byte.shape[0], byte.shape[1] * 2))


@triton.jit
def fn_to_fnuz(byte):
    """E4M3FN bytes -> the E4M3FNUZ bytes of half the value: -0 has no code there, and NaN is 0x80."""
    byte = tl.where(byte == 0x80, 0, byte)
    return tl.where((byte & 0x7F) == 0x7F, 0x80, byte).to(tl.uint8)


@triton.jit
def pow2_exponent(amax, limit, ROUNDING: tl.constexpr, MAX_EXPONENT: tl.constexpr):
    """Exponent of a block's power-of-two scale, int32 in -127 … 127, from its amax (fp32, not negative).

    pow2_ceil: the smallest 2^e >= amax / limit. pow2_floor: floor(log2(amax)) - MAX_EXPONENT.
    Read from the bits, so that no logarithm can round across an integer.
    """
    if ROUNDING == "pow2_ceil":
        bits = tl.div_rn(amax, limit).to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 127 + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
        exponent = tl.where(bits <= 0x400000, -127, exponent)  # subnormals up to 2^-127
        exponent = tl.where(bits == 0, 0, exponent)
    else:
        bits = amax.to(tl.int32, bitcast=True)
        exponent = tl.where(bits == 0, -1, (bits >> 23) - 127) - MAX_EXPONENT
    return tl.minimum(tl.maximum(exponent, -127), 127)


@triton.jit
def pow2(exponent):
    """int32 in -127 … 127 -> 2^exponent, fp32."""
    bits = tl.where(exponent == -127, 0x00400000, (exponent + 127) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _encode_fp8(
    x,
    BIAS: tl.constexpr,
    MANTISSA: tl.constexpr,
    MAX_CODE: tl.constexpr,
    NAN: tl.constexpr,
    SIGNED_ZERO: tl.constexpr,
):
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal results: add half of the dropped part, one more when the kept part is odd, and drop it.
    DROP: tl.constexpr = 23 - MANTISSA
    odd = (magnitude >> DROP) & 1
    rounded = (magnitude + ((1 << (DROP - 1)) - 1) + odd) >> DROP
    normal = tl.minimum(rounded, MAX_CODE + ((127 - BIAS) << MANTISSA)) - ((127 - BIAS) << MANTISSA)
    # Subnormal results: beside a number whose last bit weighs one subnormal step, the adder does the rounding.
    STEP: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    beside = (magnitude.to(tl.float32, bitcast=True) + STEP).to(tl.uint32, bitcast=True)
    subnormal = beside & ((2 << MANTISSA) - 1)
    code = tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)
    sign = (bits >> 24) & 0x80
    if not SIGNED_ZERO:
        sign = tl.where(code == 0, 0, sign)
    return tl.where(magnitude >= 0x7F800000, NAN, code | sign).to(tl.uint8)


@triton.jit
def _encode_e2m1(x):
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    # Midpoints of 0, 0.5, 1, 1.5, 2, 3, 4, 6; a tie goes to the even code.
    code = (magnitude > 0.25).to(tl.int32) + (magnitude >= 0.75).to(tl.int32) + (magnitude > 1.25).to(tl.int32)
    code += (magnitude >= 1.75).to(tl.int32) + (magnitude > 2.5).to(tl.int32) + (magnitude >= 3.5).to(tl.int32)
    code += (magnitude > 5.0).to(tl.int32)
    code = code.to(tl.uint32) | ((bits >> 28) & 8)
    return tl.where(magnitude != magnitude, 0, code).to(tl.uint8)


@triton.jit
def _decode_fp16(byte, ELEMENT: tl.constexpr):
    wide = byte.to(tl.uint16)
    if ELEMENT == "fp4":
        bits = ((wide & 7) << 9) | ((wide & 8) << 12)
        value = bits.to(tl.float16, bitcast=True) * 16384.0
    elif ELEMENT == "fp8e5m2":
        value = (wide << 8).to(tl.float16, bitcast=True)
    else:
        bits = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
        if ELEMENT == "fp8":
            bits = tl.where((wide & 0x7F) == 0x7F, 0x7E00, bits)
            value = bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0
        else:
            tl.static_assert(ELEMENT == "fp8fnuz", "unknown element")
            bits = tl.where(wide == 0x80, 0x7E00, bits)
            value = bits.to(tl.uint16).to(tl.float16, bitcast=True) * 128.0
    return value


@triton.jit
def _decode_bf16(byte, ELEMENT: tl.constexpr):
    # Through fp32, whose upper half bf16 is: not every target multiplies in bf16.
    wide = byte.to(tl.uint32)
    if ELEMENT == "fp4":
        bits = ((wide & 7) << 22) | ((wide & 8) << 28)
        value = bits.to(tl.float32, bitcast=True) * (2.0**126)
    elif ELEMENT == "fp8e5m2":
        bits = ((wide & 0x7F) << 21) | ((wide & 0x80) << 24)
        bits = tl.where((wide & 0x7C) == 0x7C, bits | 0x7F800000, bits)  # its infinity and NaN become fp32's
        value = bits.to(tl.float32, bitcast=True) * (2.0**112)
    else:
        bits = ((wide & 0x7F) << 20) | ((wide & 0x80) << 24)
        if ELEMENT == "fp8":
            bits = tl.where((wide & 0x7F) == 0x7F, 0x7FC00000, bits)
            value = bits.to(tl.uint32).to(tl.float32, bitcast=True) * (2.0**120)
        else:
            tl.static_assert(ELEMENT == "fp8fnuz", "unknown element")
            bits = tl.where(wide == 0x80, 0x7FC00000, bits)
            value = bits.to(tl.uint32).to(tl.float32, bitcast=True) * (2.0**119)
    return value.to(tl.bfloat16)
