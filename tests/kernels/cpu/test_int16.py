"""`cpu.int16`: asked for by the numerics, held to the bound of its own steps."""

import pytest
import torch

import native_cases
from blockscale import Platform, reference
from blockscale.formats import get_format
from blockscale.kernels.cpu import Int16Linear
from blockscale.numerics import get_numerics
from blockscale.registry import select
from blockscale.tensor import BlockScaled
from native_cases import exact, problem, reasons, worst_row

pytestmark = native_cases.NEEDS_LIBRARY

INT16 = "cpu:avx512+cpu-native=avx512"
ALLOWED = "weight_only,int16=True"


def test_int16_is_never_chosen_unless_the_numerics_allow_it():
    w = reference.quantize(torch.randn(64, 256), get_format("fp8_128x128"))
    exact_problem, allowed = problem(w, torch.randn(1, 256)), problem(w, torch.randn(1, 256), get_numerics(ALLOWED))
    platform = Platform.parse(INT16)
    assert reasons(Int16Linear(), exact_problem, INT16) == [
        "multiplies in 16-bit fixed point (error 3e-4), which the numerics do not allow: they need int16=True"
    ]
    assert reasons(Int16Linear(), allowed, INT16) == []
    assert select(exact_problem, platform).pick(128).name == "cpu.native"
    assert [select(allowed, platform).pick(m).name for m in (1, 7, 8, 1024)] == ["cpu.native"] * 2 + ["cpu.int16"] * 2


def test_int16_says_why_not():
    allowed = get_numerics(ALLOWED)
    blocks = problem(
        reference.quantize(torch.randn(64, 256), get_format("fp8_32x32_ue8m0")), torch.randn(1, 256), allowed
    )
    assert reasons(Int16Linear(), blocks, INT16) == ["w has blocks 32 columns wide, needs a multiple of 128"]
    e5m2 = problem(reference.quantize(torch.randn(64, 256), get_format("fp8e5m2_row")), torch.randn(1, 256), allowed)
    assert reasons(Int16Linear(), e5m2, "cpu:x86_64+cpu-native=sse2") == [
        "needs AVX2 or AVX-512, the native library uses sse2",
        "reads E4M3 weights, not fp8e5m2_row",
    ]
    half = problem(
        reference.quantize(torch.randn(64, 256), get_format("fp8_128x128")), torch.randn(1, 256).bfloat16(), allowed
    )
    assert reasons(Int16Linear(), half, "cpu:avx512+cpu-native=avx512bf16") == [
        "cpu.native multiplies in bf16 here, which is as fast and exact"
    ]


def int16_bound(x, w):
    """What the steps, 1/32 for w and 1/8191 of the largest of 128 for x, can do to `x: [M, K]` times `w: [N, K]`."""
    k = x.shape[1]
    groups = [slice(i, i + 128) for i in range(0, k, 128)]
    dense = reference.dequantize(w).double().abs()
    step = torch.ones_like(w.data, dtype=torch.float32).to(w.data.dtype)  # the value 1, which the scales make 1 * scale
    half_step = reference.dequantize(BlockScaled(step, w.scale, w.format)).double() / 64
    x = x.double().abs()
    rounded_x = sum(x[:, g].amax(1)[:, None] / 16382 * (dense + half_step)[:, g].sum(1)[None] for g in groups)
    return rounded_x + x @ half_step.T + (k + 16) * 2.0**-24 * (x @ dense.T)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("m", [8, 9, 70])
@pytest.mark.parametrize("name", ["fp8_128x128", "fp8_1x128", "fp8_row", "fp8_128x128_ue8m0"])
@pytest.mark.parametrize("numerics", ["weight_only,int16=True", "checkpoint,int16=True"])
def test_int16_keeps_the_bound_of_its_steps(int16_isa, name, m, numerics):
    x, policy = torch.randn(m, 590) * torch.randn(m, 1).exp(), get_numerics(numerics)
    w = reference.quantize(torch.randn(133, 590), get_format(name))
    y, want = Int16Linear().run(problem(w, x, policy), x, w, None), exact(x, w, None, policy)
    seen = reference.activations(x, w, policy)
    assert (y.double() - want).abs().le(int16_bound(seen, w)).all()
    assert worst_row(y, want) < 3e-4
    assert (
        (y.double() - want)
        .abs()
        .le(Int16Linear.accumulation_error * (seen.abs() @ reference.dequantize(w).abs().T))
        .all()
    )


def test_int16_gives_nan_where_a_weight_or_an_activation_is_not_a_number(int16_isa):
    x, w = torch.randn(8, 256), reference.quantize(torch.randn(64, 256), get_format("fp8_128x128"))
    w.data.view(torch.uint8)[3, 200] = 0xFF
    x[2, 7] = torch.inf
    y = Int16Linear().run(problem(w, x, get_numerics(ALLOWED)), x, w, None)
    assert y.isnan().nonzero().tolist() == sorted([[m, 3] for m in range(8) if m != 2] + [[2, n] for n in range(64)])
