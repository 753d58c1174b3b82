"""The integer codec, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from blockscale import layouts, reference
from blockscale.formats import get_format
from blockscale.kernels.triton import codec

NAMES = {"fp8": "fp8_tensor", "fp8e5m2": "fp8e5m2_tensor", "fp8fnuz": "fp8fnuz_tensor", "fp4": "mxfp4"}


@triton.jit
def encode_kernel(x_ptr, y_ptr, ELEMENT: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, codec.encode(tl.load(x_ptr + at), ELEMENT))


@triton.jit
def decode_kernel(x_ptr, y_ptr, ELEMENT: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, codec.decode(tl.load(x_ptr + at), ELEMENT, y_ptr.dtype.element_ty))


@triton.jit
def scale_kernel(x_ptr, y_ptr, KIND: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, codec.decode_scale(tl.load(x_ptr + at), KIND))


@triton.jit
def exponent_kernel(x_ptr, e_ptr, s_ptr, ROUNDING: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    exponent = codec.pow2_exponent(tl.load(x_ptr + at), 448.0, ROUNDING, 8)
    tl.store(e_ptr + at, exponent)
    tl.store(s_ptr + at, codec.pow2(exponent))


@triton.jit
def fnuz_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, codec.fn_to_fnuz(tl.load(x_ptr + at)))


@triton.jit
def pack_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    code = tl.load(x_ptr + tl.arange(0, 2)[:, None] * N + tl.arange(0, N)[None, :])
    byte = codec.pack_fp4(code)
    half = tl.arange(0, 2)[:, None] * (N // 2) + tl.arange(0, N // 2)[None, :]
    tl.store(y_ptr + half, byte)
    tl.store(z_ptr + tl.arange(0, 2)[:, None] * N + tl.arange(0, N)[None, :], codec.unpack_fp4(byte))


def encode(x, element):
    n = triton.next_power_of_2(x.numel())
    padded = torch.nn.functional.pad(x, (0, n - x.numel()))
    y = torch.zeros(n, dtype=torch.uint8)
    encode_kernel[(1,)](padded, y, ELEMENT=element, N=n)
    return y[: x.numel()]


LITERAL = [
    ("fp8", [448.0, 464.0, 1e30, -0.0, 17.0, 19.0], [0x7E, 0x7E, 0x7E, 0x80, 0x58, 0x5A]),
    ("fp8", [2.0**-9, 2.0**-10, -3 * 2.0**-10], [1, 0, 0x82]),
    ("fp8", [float("inf"), -float("inf"), float("nan")], [0x7F, 0x7F, 0x7F]),
    ("fp8e5m2", [57344.0, 61440.0, -0.0, 2.0**-16, float("inf")], [0x7B, 0x7B, 0x80, 1, 0x7F]),
    ("fp8fnuz", [240.0, 250.0, -0.0, -(2.0**-12), float("nan")], [0x7F, 0x7F, 0, 0, 0x80]),
    ("fp4", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0, -0.1, float("nan")], [0, 2, 2, 4, 4, 6, 6, 7, 8, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("element", "values", "codes"), LITERAL)
def test_encode_literal(element, values, codes):
    assert encode(torch.tensor(values), element).tolist() == codes


@pytest.mark.parametrize("element", NAMES)
def test_encode_every_bf16_its_neighbours_and_random_bits(element, g):
    coarse = torch.arange(1 << 16, dtype=torch.int32) << 16
    near = (coarse[::7, None] + torch.tensor([-1, 1, 0x7FFF, 0x8000, 0x8001])).flatten().int()
    random = torch.randint(-(2**31), 2**31, (1 << 17,), generator=g, dtype=torch.int64).int()
    x = torch.cat([coarse, near, random]).view(torch.float32)
    assert torch.equal(encode(x, element), reference.encode(x, get_format(NAMES[element])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("element", NAMES)
def test_decode_every_code(element, dtype):
    fmt = get_format(NAMES[element])
    codes = torch.arange(16 if fmt.packed else 256, dtype=torch.uint8)
    want = reference.decode(codes, fmt)[::2] if fmt.packed else codes.view(fmt.element.dtype).float()
    got = torch.zeros(codes.numel(), dtype=dtype)
    decode_kernel[(1,)](codes, got, ELEMENT=element, N=codes.numel())
    bits, want_bits = got.float().view(torch.int32), want.view(torch.int32)
    assert torch.equal(torch.where(got.isnan(), 0, bits), torch.where(want.isnan(), 0, want_bits))
    assert torch.equal(got.isnan(), want.isnan())


def test_decode_literal():
    got = torch.zeros(4)
    decode_kernel[(1,)](torch.tensor([0x7E, 0x01, 0x80, 0x38], dtype=torch.uint8), got, ELEMENT="fp8", N=4)
    assert got.tolist() == [448.0, 2.0**-9, 0.0, 1.0]
    assert got.signbit().tolist() == [False, False, True, False]


def test_e8m0_every_byte():
    byte, got = torch.arange(256, dtype=torch.uint8), torch.zeros(256)
    scale_kernel[(1,)](byte, got, KIND="e8m0", N=256)
    want = layouts.decode_scale(byte.view(torch.float8_e8m0fnu))
    assert got[0].item() == 2.0**-127
    assert got[127].item() == 1.0
    assert got[255].isnan()
    assert torch.equal(got[:255], want[:255])


@pytest.mark.parametrize("rounding", ["pow2_ceil", "pow2_floor"])
def test_exponents_at_and_around_every_power_of_two(rounding):
    fmt = get_format("mxfp8")
    powers = torch.ldexp(torch.ones(277), torch.arange(-149, 128))
    bits = torch.cat([powers, powers * 448]).view(torch.int32)
    amax = (bits[:, None] + torch.tensor([-1, 0, 1])).flatten().int().view(torch.float32)
    amax = torch.where(amax.isfinite(), amax.abs(), 0.0)
    n = triton.next_power_of_2(amax.numel())
    amax = torch.nn.functional.pad(amax, (0, n - amax.numel()))
    exponent, scale = torch.zeros(n, dtype=torch.int32), torch.zeros(n)
    exponent_kernel[(1,)](amax, exponent, scale, ROUNDING=rounding, N=n)
    assert torch.equal(scale, reference.round_scale(amax, fmt, rounding))


def test_fnuz_recoding_of_every_byte():
    byte, got = torch.arange(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
    fnuz_kernel[(1,)](byte, got, N=256)
    value, want = got.view(torch.float8_e4m3fnuz).float() * 2, byte.view(torch.float8_e4m3fn).float()
    assert torch.equal(value.nan_to_num(999.0), want.nan_to_num(999.0))
    assert got[[0x00, 0x80, 0x7F, 0xFF, 0x7E]].tolist() == [0, 0, 0x80, 0x80, 0x7E]


def test_fp4_packing_puts_the_even_column_low():
    codes = (torch.arange(32, dtype=torch.uint8) % 16).reshape(2, 16)
    byte, back = torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, 16, dtype=torch.uint8)
    pack_kernel[(1,)](codes, byte, back, N=16)
    assert byte[0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(back, codes)
