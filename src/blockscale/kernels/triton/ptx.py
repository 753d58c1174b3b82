"""The codec in NVIDIA's assembly, for loops that decode every weight they read.

Four bytes lie in a register and two results leave in one: `prmt` spreads two bytes over two halves with their signs
behind them, a shift and a mask put every bit in its place. What `codec` does element by element costs four times as
many instructions.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

FP16_LIFT = 2.0**8
"""What `decode_ptx` to fp16 leaves to multiply by."""
FP4_FP16_LIFT = 2.0**14
"""The same of `decode_fp4_ptx`."""
CHECKED_LIFT = 1.0 / 144.0
"""The same of `decode_ptx_checked`: 144 * 448 is the largest finite code and 144 * 480, the NaN code, overflows."""


@triton.jit
def reciprocal_ptx(x):
    """`1 / x` of fp32, correctly rounded, for normal x with a normal reciprocal whose significand is not all ones.

    The chip's approximation is within one unit; one Newton step gets all but eleven significands right and two get
    all but that of 2 - 2^-23, tried for all 2^23 and every error of the start. Twice as fast as a division, which
    branches.
    """
    r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    minus = x * -1.0
    r = tl.fma(tl.fma(minus, r, 1.0), r, r)
    return tl.fma(tl.fma(minus, r, 1.0), r, r)


@triton.jit
def add_scaled_ptx(acc, part, scale):
    """`acc + part * scale`, kept where it stands: LLVM moves plain additions behind the next matrix instruction, whose
    result then needs registers of its own, and spills."""
    scale = tl.broadcast_to(scale, part.shape)
    return tl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=r,r,r,r", [part, scale, acc], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def decode_ptx_checked(byte):
    """E4M3FN bytes -> fp16 holding value * 144, NaN codes as infinity: two instructions of ten fewer than `decode_ptx`.

    For products whose other factor is finite or NaN and whose sum cannot overflow otherwise: there infinity means NaN.
    144 has four bits, so no product with the four of a code is rounded.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, lift;
        mov.b32 lift, 0x78807880;
        prmt.b32 a, $2, 0, 0x9180;
        prmt.b32 b, $2, 0, 0xB3A2;
        shl.b32 a, a, 7;
        shl.b32 b, b, 7;
        and.b32 a, a, 0xBF80BF80;
        and.b32 b, b, 0xBF80BF80;
        mul.f16x2 $0, a, lift;
        mul.f16x2 $1, b, lift;
        }""",
        "=r,=r,r",
        [byte],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def decode_ptx(byte, DTYPE: tl.constexpr):
    """E4M3FN bytes -> fp16 holding value * 2^-8, or bf16 holding the value; NaN codes become NaN. NVIDIA only.

    A product that overflows for the NaN code (480) and not for 448, times zero, is NaN or nothing to add: that part
    runs beside the integer pipe, which is the one in demand.
    """
    if tl.float16 == DTYPE:
        value = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, over, zero;
            mov.b32 over, 0x78447844;
            mov.b32 zero, 0;
            prmt.b32 a, $2, 0, 0x9180;
            prmt.b32 b, $2, 0, 0xB3A2;
            shl.b32 a, a, 7;
            shl.b32 b, b, 7;
            and.b32 a, a, 0xBF80BF80;
            and.b32 b, b, 0xBF80BF80;
            mul.f16x2 c, a, over;
            mul.f16x2 d, b, over;
            fma.rn.f16x2 $0, c, zero, a;
            fma.rn.f16x2 $1, d, zero, b;
            }""",
            "=r,=r,r",
            [byte],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        tl.static_assert(tl.bfloat16 == DTYPE, "decode_ptx to fp16 or bf16")
        value = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, bias, over, zero, none;
            mov.b32 bias, 0x7B807B80;
            mov.b32 over, 0x7B107B10;
            mov.b32 zero, 0;
            mov.b32 none, 0x80008000;
            prmt.b32 a, $2, 0, 0x9180;
            prmt.b32 b, $2, 0, 0xB3A2;
            shl.b32 a, a, 4;
            shl.b32 b, b, 4;
            and.b32 a, a, 0x87F087F0;
            and.b32 b, b, 0x87F087F0;
            fma.rn.bf16x2 a, a, bias, none;
            fma.rn.bf16x2 b, b, bias, none;
            fma.rn.bf16x2 c, a, over, none;
            fma.rn.bf16x2 d, b, over, none;
            fma.rn.bf16x2 $0, c, zero, a;
            fma.rn.bf16x2 $1, d, zero, b;
            }""",
            "=r,=r,r",
            [byte],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return value


@triton.jit
def decode_fp4_ptx(byte, DTYPE: tl.constexpr):
    """`[rows, n]` bytes of two E2M1 codes -> `[rows, 2 n]`: fp16 of value * 2^-14, or bf16 of the value; NVIDIA."""
    if tl.float16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            shl.b32 c, a, 9;
            shl.b32 d, a, 12;
            and.b32 c, c, 0x0E000E00;
            and.b32 d, d, 0x80008000;
            or.b32 $0, c, d;
            shl.b32 c, b, 9;
            shl.b32 d, b, 12;
            and.b32 c, c, 0x0E000E00;
            and.b32 d, d, 0x80008000;
            or.b32 $1, c, d;
            shl.b32 c, a, 5;
            shl.b32 d, a, 8;
            and.b32 c, c, 0x0E000E00;
            and.b32 d, d, 0x80008000;
            or.b32 $2, c, d;
            shl.b32 c, b, 5;
            shl.b32 d, b, 8;
            and.b32 c, c, 0x0E000E00;
            and.b32 d, d, 0x80008000;
            or.b32 $3, c, d;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [byte],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        tl.static_assert(tl.bfloat16 == DTYPE, "decode_fp4_ptx to fp16 or bf16")
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, bias, none;
            mov.b32 bias, 0x7E807E80;
            mov.b32 none, 0x80008000;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            shl.b32 c, a, 6;
            shl.b32 d, a, 12;
            and.b32 c, c, 0x01C001C0;
            and.b32 d, d, 0x80008000;
            or.b32 c, c, d;
            fma.rn.bf16x2 $0, c, bias, none;
            shl.b32 c, b, 6;
            shl.b32 d, b, 12;
            and.b32 c, c, 0x01C001C0;
            and.b32 d, d, 0x80008000;
            or.b32 c, c, d;
            fma.rn.bf16x2 $1, c, bias, none;
            shl.b32 c, a, 2;
            shl.b32 d, a, 8;
            and.b32 c, c, 0x01C001C0;
            and.b32 d, d, 0x80008000;
            or.b32 c, c, d;
            fma.rn.bf16x2 $2, c, bias, none;
            shl.b32 c, b, 2;
            shl.b32 d, b, 8;
            and.b32 c, c, 0x01C001C0;
            and.b32 d, d, 0x80008000;
            or.b32 c, c, d;
            fma.rn.bf16x2 $3, c, bias, none;
            }""",
            "=&r,=&r,=&r,=&r,r",
            [byte],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    return tl.reshape(tl.join(low, high), (byte.shape[0], byte.shape[1] * 2))
