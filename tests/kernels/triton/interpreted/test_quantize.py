"""Every quantize kernel against the reference: the same bytes."""

import itertools
from dataclasses import replace

import pytest
import torch

from blockscale import layouts, reference
from blockscale.formats import get_format
from blockscale.kernels.triton import quantize as q

GROUPED = ("fp8_1x128", "fp8_1x48", "fp8_1x32_ue8m0", "fp8e5m2_1x64", "fp8fnuz_1x128_ue8m0", "mxfp8", "mxfp4", "nvfp4")
WHOLE = ("fp8_row", "fp8_tensor", "fp8_tensor_ue8m0", "fp8_128x128", "fp8_32x32_ue8m0", "fp8_48x80")


def fits(name, layout):
    fmt = get_format(name)
    if layout == "tma":
        return fmt.scale_dtype == torch.float32
    if layout == "ue8m0x4":
        return fmt.scale_dtype == torch.float8_e8m0fnu
    return layout != "fnuz" or fmt.element.name == "fp8"


CASES = [(f, y) for f, y in itertools.product(GROUPED, ("row", "tma", "ue8m0x4")) if fits(f, y)]
CASES += [(f, y) for f, y in itertools.product(WHOLE, ("row", "tma", "ue8m0x4")) if fits(f, y)]
CASES += [("fp8_1x128", "fnuz"), ("fp8_1x32_ue8m0", "fnuz"), ("fp8_128x128", "fnuz"), ("fp8_1x48", "col_scales"),
          ("fp8_row", "col_scales"), ("mxfp4", "col_scales"), ("fp8_32x32_ue8m0", "col_scales")]  # fmt: skip


def awkward(rows, cols, dtype, g):
    """Rows of very different size, one of zeros, one below the floor, non-finite values, -0."""
    x = torch.randn(rows, cols, generator=g) * torch.exp(torch.randn(rows, 1, generator=g) * 6)
    x[0] = 0
    x[1, 1] = -0.0
    x[2] *= 1e-30
    x[-1, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    return x.to(dtype)


def differing(got, want):
    """Bytes that differ in data, scale and global scale."""
    pairs = [(got.data, want.data), (got.scale, want.scale)]
    if want.global_scale is not None:
        pairs.append((got.global_scale, want.global_scale))
    for a, b in pairs:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return [int((a.reshape(-1).view(torch.uint8) != b.reshape(-1).view(torch.uint8)).sum()) for a, b in pairs]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_bytes(name, layout, platform, g):
    fmt = get_format(name)
    x = awkward(7, 176 if fmt.packed else 200, torch.bfloat16, g)
    got = q.quantize(x, fmt, platform, layout=layout)
    assert differing(got, layouts.convert(reference.quantize(x, fmt), layout)) in ([0, 0], [0, 0, 0])


def column(k):
    """Where the matrix unit wants column k of 32: a lane t of four holds eight side by side, bits u, h, l of them."""
    t, u, h, low = k // 8, k // 4 % 2, k // 2 % 2, k % 2
    return 16 * u + 8 * h + 2 * t + low


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("name", ["fp8_1x32_ue8m0", "fp8_1x128_ue8m0", "fp8e5m2_1x64_ue8m0", "mxfp8", "mxfp4", "nvfp4"])
def test_values_are_codes_times_scales(name, rows, shuffled, platform, g):
    """One group a program and many; the second level stays apart."""
    fmt = get_format(name)
    x = awkward(rows, 256, torch.bfloat16, g)
    got, level = q.quantized_values(x, fmt, platform, torch.float32, shuffled=shuffled)
    if shuffled:
        got = got[:, [k // 32 * 32 + column(k % 32) for k in range(256)]]
    want = reference.quantize(x, fmt)
    assert (level is None) == (want.global_scale is None)
    if level is not None:
        assert torch.equal(level, want.global_scale)
        want = replace(want, global_scale=torch.ones(()))
    values = reference.dequantize(want)
    assert got.shape == (rows, 256)
    assert values[-1, :3].isnan().all()
    assert torch.equal(got.isnan(), values.isnan())
    assert torch.equal(got.nan_to_num(0).view(torch.int32), values.nan_to_num(0).view(torch.int32))  # -0 too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["fp8_1x128", "mxfp8", "fp8_128x128"])
def test_dtypes_and_strides(name, dtype, platform, g):
    fmt = get_format(name)
    x = torch.cat([awkward(5, 130, dtype, g), torch.full((5, 126), torch.nan, dtype=dtype)], 1)[:, :130]
    assert x.stride(0) == 256
    assert differing(q.quantize(x, fmt, platform), reference.quantize(x, fmt)) == [0, 0]


def test_one_row_and_many(platform, g):
    fmt = get_format("fp8_1x128")
    x = torch.randn(37, 384, generator=g)
    got = q.quantize(x, fmt, platform, layout="tma")
    assert got.scale.shape == (3, 40)
    assert (got.scale[:, 37:] == 0).all()
    assert torch.equal(got.data[5:6].view(torch.uint8), q.quantize(x[5:6], fmt, platform).data.view(torch.uint8))


@pytest.mark.parametrize("name", ["fp8_1x128", "fp8_1x128_ue8m0", "fp8_row"])
def test_floor_and_rounding(name, platform, g):
    fmt = get_format(name)
    x = torch.randn(3, 256, generator=g) * 1e-6
    got = q.quantize(x, fmt, platform, floor=1e-4, scale_rounding="pow2_ceil")
    assert differing(got, reference.quantize(x, fmt, floor=1e-4, scale_rounding="pow2_ceil")) == [0, 0]
    assert layouts.decode_scale(got.scale).flatten().tolist() == [2.0**-22] * got.scale.numel()


STATIC = [
    ("fp8_tensor", (1, 1), torch.float32), ("fp8_row", (5, 1), torch.float32), ("fp8_1x32", (5, 5), torch.bfloat16),
    ("fp8_32x32_ue8m0", (1, 5), torch.float8_e8m0fnu), ("fp8_128x128", (1, 2), torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(("name", "grid", "dtype"), STATIC)
def test_given_scales(name, grid, dtype, platform, g):
    fmt, x = get_format(name), awkward(5, 130, torch.float32, g)
    value = torch.full(grid, 0.25) if dtype == torch.float8_e8m0fnu else torch.rand(grid, generator=g) + 0.5
    scale = layouts.encode_e8m0(value) if dtype == torch.float8_e8m0fnu else value.to(dtype)
    got = q.quantize(x, fmt, platform, scale=scale)
    assert differing(got, reference.quantize(x, fmt, scale=scale)) == [0, 0]
    assert got.scale is scale


def test_given_level(platform, g):
    x, level = torch.randn(4, 64, generator=g), torch.tensor(0.01)
    got = q.quantize(x, get_format("nvfp4"), platform, level=level)
    assert differing(got, reference.quantize(x, get_format("nvfp4"), global_scale=level)) == [0, 0, 0]


@pytest.mark.parametrize(("limit", "weighted"), [(None, False), (2.0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_swiglu(limit, weighted, dtype, platform, g):
    fmt = get_format("fp8_1x128")
    x = (torch.randn(6, 400, generator=g) * 3).to(dtype)
    x[2, 7], x[3, 207] = torch.nan, torch.inf
    weight = torch.rand(6, generator=g) if weighted else None
    got = q.swiglu_quantize(x, fmt, platform, limit=limit, routing_weight=weight, layout="tma")
    want = reference.quantize(reference.swiglu(x, limit, weight), fmt)
    assert_close(got, layouts.convert(want, "tma"))


def test_swiglu_literal(platform):
    """gate 8 clamped to 2, up -8 clamped to -2: silu(2) * -2 * 0.5, the largest of its group, so its code is -448."""
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 32] = 8.0, -8.0
    got = q.swiglu_quantize(x, get_format("fp8_1x32"), platform, limit=2.0, routing_weight=torch.tensor([0.5]))
    assert got.data.view(torch.uint8)[0, 0].item() == 0xFE
    assert got.scale.item() == pytest.approx(1.7615941559557649 / 448)


@pytest.mark.parametrize("layout", ["row", "ue8m0x4"])
def test_rmsnorm(layout, platform, g):
    fmt = get_format("fp8_1x128_ue8m0")
    x, weight = torch.randn(5, 400, generator=g).half(), torch.rand(400, generator=g).half()
    got = q.rmsnorm_quantize(x, weight, 1e-6, fmt, platform, layout=layout)
    assert_close(got, layouts.convert(reference.quantize(reference.rmsnorm(x, weight, 1e-6), fmt), layout))


def assert_close(got, want):
    """exp and the mean may round differently in the last bit: codes one step apart where they do, and that is rare."""
    a, b = (t.data.view(torch.uint8).int() for t in (got, want))
    assert int((a - b).abs().max()) <= 1
    assert float((a != b).float().mean()) < 0.01
    scales = [s.view(torch.int32) if s.dtype != torch.float32 else s for s in (got.scale, want.scale)]
    assert torch.allclose(scales[0].double(), scales[1].double(), rtol=2e-3)


def test_tickets_are_zeroed_on_the_way(platform, g):
    tickets = torch.full((1500,), 7, dtype=torch.int32)
    q.quantize(torch.randn(3, 256, generator=g), get_format("fp8_1x128"), platform, tickets=tickets)
    assert int(tickets.abs().sum()) == 0
