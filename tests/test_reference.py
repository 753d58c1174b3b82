"""The definition itself, against literal values and against plain arithmetic in fp64."""

import math

import pytest
import torch

from blockscale import DtypeError, ScaleError, ShapeError, get_format, get_numerics, reference
from blockscale.layouts import decode_scale

FP8 = get_format("fp8_1x128")


def bytes_of(t):
    return t.view(torch.uint8).tolist()


def row(*values, width=128):
    x = torch.zeros(1, width)
    x[0, : len(values)] = torch.tensor(values)
    return x


def test_scale_is_amax_over_448_in_fp32():
    q = reference.quantize(row(1.0, -3.0), FP8)
    assert q.scale.item() == torch.tensor(3.0).div(448.0).item()


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (448.0, 0x7E), (-448.0, 0xFE), (0.0, 0x00), (-0.0, 0x80), (1.0, 0x38),
        (2.0**-9, 0x01), (2.0**-10, 0x00), (3 * 2.0**-10, 0x02),  # smallest subnormal; ties to even
        (17.0, 0x58), (19.0, 0x5A), (432.0, 0x7E), (float("nan"), 0x7F), (float("inf"), 0x7F), (float("-inf"), 0x7F),
    ],
)  # fmt: skip
def test_codes_under_a_scale_of_one(value, code):
    q = reference.quantize(row(448.0, value), FP8)
    assert q.scale.item() == 1.0
    assert bytes_of(q.data)[0][1] == code


def test_nonfinite_values_do_not_move_the_scale_of_their_block():
    q = reference.quantize(row(7.0, math.inf, math.nan), FP8)
    assert q.scale.item() == 7.0 / 448 or q.scale.item() == torch.tensor(7.0).div(448).item()
    assert torch.equal(reference.dequantize(q).isnan()[0, :4], torch.tensor([False, True, True, False]))


@pytest.mark.parametrize(("rounding", "amax", "scale"), [
    ("pow2_ceil", 448.0, 1.0), ("pow2_ceil", 449.0, 2.0), ("pow2_ceil", 447.0, 1.0), ("pow2_ceil", 224.0, 0.5),
    ("pow2_floor", 256.0, 1.0), ("pow2_floor", 511.0, 1.0), ("pow2_floor", 512.0, 2.0), ("pow2_floor", 255.0, 0.5),
])  # fmt: skip
def test_powers_of_two(rounding, amax, scale):
    q = reference.quantize(row(amax), get_format("fp8_1x128_ue8m0"), scale_rounding=rounding)
    assert q.scale.dtype == torch.float8_e8m0fnu
    assert decode_scale(q.scale).item() == scale


@pytest.mark.parametrize(("floor", "amax"), [(None, 1e-10), (1e-4, 1e-4)])
def test_the_floor_bounds_amax(floor, amax):
    q = reference.quantize(torch.zeros(1, 128), FP8, floor=floor)
    assert q.scale.item() == torch.tensor(amax).div(448.0).item()
    assert not reference.dequantize(q).any()


def test_pow2_ceil_never_saturates_and_is_tight():
    x = torch.randn(512, 128) * torch.exp(torch.randn(512, 1) * 4)
    s = decode_scale(reference.quantize(x, get_format("fp8_1x128_ue8m0")).scale)[:, 0]
    amax = x.abs().amax(1)
    assert ((amax / s <= 448) & (amax / s > 224)).all()


@pytest.mark.parametrize("rows", [1, 100, 128, 129])
@pytest.mark.parametrize("cols", [1, 96, 128, 200])
def test_ragged_edges_are_zero_padded(rows, cols):
    fmt = get_format("fp8_128x128")
    x = torch.randn(rows, cols)
    padded = torch.zeros(256, 256)
    padded[:rows, :cols] = x
    q, p = reference.quantize(x, fmt), reference.quantize(padded, fmt)
    assert bytes_of(q.data) == bytes_of(p.data[:rows, :cols])
    gr, gc = fmt.scale_shape(rows, cols)
    assert torch.equal(q.scale, p.scale[:gr, :gc])


@pytest.mark.parametrize("name", ["fp8_128x128", "fp8e5m2_1x128", "fp8fnuz_row", "mxfp8", "mxfp4", "nvfp4"])
def test_error_is_within_half_a_step(name):
    fmt = get_format(name)
    x = torch.randn(130, 192)
    error = (reference.dequantize(reference.quantize(x, fmt)) - x).abs()
    step = {"fp8": 2.0**-4, "fp8e5m2": 2.0**-3, "fp8fnuz": 2.0**-4, "fp4": 0.25}[fmt.element.name]
    blocks = reference.to_blocks(x, fmt)
    amax = reference.block_amax(blocks)
    br, bc = fmt.block_shape(*x.shape)
    amax = amax.repeat_interleave(br, 0)[:130].repeat_interleave(bc, 1)[:, :192]
    top = 0.125 if fmt.scale_rounding == "pow2_floor" else 0.0  # MX saturates the top of a block: up to 12.5 % (e4m3)
    top = 0.25 if name == "mxfp4" else top
    floor = amax * {"fp4": 1 / 12}.get(fmt.element.name, 2.0**-16)
    assert (error <= x.abs() * max(step * 1.01, top) + floor * 1.1).all()


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, 0),
        (0.25, 0),
        (0.26, 1),
        (0.75, 2),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (5.0, 6),
        (5.01, 7),
        (-1.0, 10),
        (-0.0, 8),
    ],
)
def test_fp4_codes_round_ties_to_even(value, code):
    assert reference.encode_fp4(torch.tensor([value])).item() == code


def test_fp4_packs_the_even_column_low():
    q = reference.quantize(
        row(6.0, -6.0, 1.0, width=32), get_format("mxfp4"), scale=torch.ones(1, 1).to(torch.float8_e8m0fnu)
    )
    assert bytes_of(q.data)[0][:2] == [0xF7, 0x02]


def test_nan_in_fp4_makes_the_scale_nan():
    for name in ("mxfp4", "nvfp4"):
        x = torch.randn(2, 64)
        x[1, 40] = math.nan
        y = reference.dequantize(reference.quantize(x, get_format(name)))
        assert y[0].isfinite().all()
        assert y[1, 40].isnan()
        assert y[1, :16].isfinite().all()


def test_static_scale_is_used_as_given():
    q = reference.quantize(row(10.0, 1e6), FP8, scale=torch.full((1, 1), 0.5))
    assert reference.dequantize(q)[0, :2].tolist() == [10.0, 224.0]


@pytest.mark.parametrize("policy", ["checkpoint", "weight_only", "deepseek_v4"])
def test_linear_is_the_product_of_dequantized_parts(policy):
    w = reference.quantize(torch.randn(192, 576), get_format("fp8_128x128"))
    x = torch.randn(3, 5, 576, dtype=torch.bfloat16)
    y = reference.linear(x, w, torch.ones(192), numerics=get_numerics(policy))
    a = reference.activations(x.reshape(15, 576), w, get_numerics(policy)).double()
    want = (a @ reference.dequantize(w).double().T + 1).to(torch.bfloat16)
    assert y.shape == (3, 5, 192)
    assert torch.equal(y.reshape(15, 192), want)


def test_v4_activation_scales_are_powers_of_two():
    w = reference.quantize(torch.randn(8, 128), get_format("fp8_128x128"))
    policy = get_numerics("deepseek_v4")
    q = reference.quantize_activations(torch.randn(4, 128), policy.activation_format(w.format), w, policy)
    mantissa, _ = torch.frexp(decode_scale(q.scale))
    assert (mantissa == 0.5).all()


def test_grouped_linear_is_one_linear_for_each_expert():
    w = reference.quantize(torch.randn(4, 64, 128), get_format("fp8_128x128"))
    x = torch.randn(7, 128)
    y = reference.grouped_linear(x, w, torch.tensor([3, 3, 5, 6]), numerics=get_numerics("checkpoint"))
    for rows, expert in ((slice(0, 3), 0), (slice(3, 5), 2), (slice(5, 6), 3)):
        assert torch.equal(y[rows], reference.linear(x[rows], w[expert], numerics=get_numerics("checkpoint")))
    assert not y[6].any()


def test_swiglu_clamps_then_weighs():
    gate_up = torch.tensor([[1.0, 9.0, 4.0, -9.0]])
    y = reference.swiglu(gate_up, limit=2.0, routing_weight=torch.tensor([0.5]))
    silu = [v / (1 + math.exp(-v)) for v in (1.0, 2.0)]
    torch.testing.assert_close(y, torch.tensor([[silu[0] * 2 * 0.5, silu[1] * -2 * 0.5]]))


@pytest.mark.parametrize(
    ("x", "kwargs", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), {}, DtypeError, "got torch.int32"),
        (torch.zeros(8), {}, ShapeError, r"needs \[..., rows, cols\]"),
        (torch.zeros(2, 0), {}, ShapeError, "cols > 0"),
        (torch.zeros(2, 256), {"scale": torch.ones(2, 1)}, ShapeError, r"needs scale \[2, 2\], got \[2, 1\]"),
        (torch.zeros(1, 128), {"scale": torch.tensor([[math.nan]])}, ScaleError, "got nan"),
        (torch.zeros(1, 128), {"scale": torch.zeros(1, 1)}, ScaleError, "finite and positive"),
        (torch.zeros(1, 128), {"scale": torch.ones(1, 1, dtype=torch.float64)}, DtypeError, "float64"),
        (torch.zeros(1, 128), {"scale": -torch.ones(1, 1)}, ScaleError, "got -1"),
    ],
)
def test_bad_input(x, kwargs, error, message):
    with pytest.raises(error, match=message):
        reference.quantize(x, FP8, **kwargs)


def test_packed_formats_need_even_columns():
    with pytest.raises(ShapeError, match="must be even"):
        reference.quantize(torch.zeros(1, 33), get_format("mxfp4"))
