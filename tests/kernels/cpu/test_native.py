"""`cpu.native` against the fp64 definition, for every instruction set that this processor has."""

import subprocess
import sys
import textwrap

import pytest
import torch

import native_cases
from blockscale import BlockscaleError, reference
from blockscale.formats import get_format
from blockscale.kernels.cpu import DenseLinear, Linear, native
from blockscale.numerics import Numerics, get_numerics
from blockscale.registry import Problem
from blockscale.tensor import BlockScaled
from native_cases import F32, WEIGHT_ONLY, exact, problem, reasons, worst_row

pytestmark = native_cases.NEEDS_LIBRARY

FORMATS = {
    "fp8_128x128": "checkpoint", "fp8_128x128_ue8m0": "deepseek_v4", "fp8_32x32_ue8m0": "deepseek_v4_1",
    "fp8_1x128": "checkpoint", "fp8_1x16": "weight_only", "fp8_row": "checkpoint", "fp8_tensor": "checkpoint",
    "fp8e5m2_128x128": "checkpoint", "mxfp8": "checkpoint", "mxfp4": "checkpoint", "nvfp4": "weight_only",
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("m", [1, 2, 3, 4, 68])
@pytest.mark.parametrize("name", FORMATS)
def test_linear_equals_the_definition_on_ragged_shapes(isa, name, m):
    x, bias = torch.randn(m, 590), torch.randn(133)
    w = reference.quantize(torch.randn(133, 590), get_format(name))
    for numerics in {WEIGHT_ONLY, get_numerics(FORMATS[name])}:
        for seen in (x, x.bfloat16()):  # bf16 takes another way where the processor multiplies it
            y = native.linear(problem(w, seen, numerics, F32), seen, w, bias)
            assert worst_row(y, exact(seen, w, bias, numerics)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 5])
def test_linear_rounds_once_to_the_result_dtype(isa, dtype, m):
    x, bias = torch.randn(m, 300).to(dtype), torch.randn(40).to(dtype)
    w = reference.quantize(torch.randn(40, 300), get_format("fp8_128x128"))
    y = native.linear(problem(w, x), x, w, bias)
    want = exact(x, w, bias, WEIGHT_ONLY)
    assert y.dtype == dtype
    assert worst_row(y, want) <= max(worst_row(want.to(dtype), want), 1e-6) * 1.05


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp8_128x128", "fp8e5m2_128x128"])
def test_every_byte_decodes(isa, name, m, dtype):
    """NaN bytes give NaN, infinities infinity, and neighbours keep their values."""
    fmt = get_format(name)
    data = torch.arange(256, dtype=torch.uint8).view(256, 1).view(fmt.element.dtype)
    w = BlockScaled(data, torch.ones(2, 1), fmt)
    x = torch.ones(m, 1, dtype=dtype)
    y = native.linear(problem(w, x, out=F32), x, w, None)
    torch.testing.assert_close(y, data.float().T.expand(m, 256), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(
    ("exponent", "size"), [(-127, 1e20), (-100, 1.0), (0, 1e-30), (0, 1e20), (100, 1e-30), (100, 1.0), (108, 1e-30)]
)
def test_extreme_scales_and_activations_keep_their_precision(isa, m, exponent, size):
    codes = torch.tensor([0.5, -1.75, 448.0, 2.0**-9]).to(torch.float8_e4m3fn).repeat(32, 32)
    w = BlockScaled(codes, torch.full((1, 1), 2.0**exponent), get_format("fp8_128x128"))
    for x in (torch.rand(m, 128) * size, (torch.rand(m, 128) * size).bfloat16()):
        want = exact(x, w, None, WEIGHT_ONLY)
        assert worst_row(native.linear(problem(w, x, out=F32), x, w, None), want) < 1e-6


@pytest.mark.parametrize("m", [1, 5, 70])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_rows_of_subnormal_x_lose_nothing_beside_ordinary_weights(isa, m, dtype):
    w = reference.quantize(torch.randn(40, 300) * 1e6, get_format("fp8_128x128"))
    x = (torch.randn(m, 300) * 2.0**-128).to(dtype)
    y = native.linear(problem(w, x, WEIGHT_ONLY, F32), x, w, None)
    assert worst_row(y, exact(x, w, None, WEIGHT_ONLY)) < 1e-6


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["fp8_128x128", "fp8e5m2_128x128", "mxfp4"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_what_an_earlier_call_left_in_scratch_memory_is_not_read(isa, m, name, dtype):
    wide = reference.quantize(torch.randn(8, 2048), get_format(name))
    bad = torch.full((m, 2048), torch.nan, dtype=dtype)
    assert native.linear(problem(wide, bad), bad, wide, None).isnan().all()
    for k in (64, 576, 580, 700):  # odd and ragged numbers of vectors
        w, x = reference.quantize(torch.randn(8, k), get_format(name)), torch.randn(m, k).to(dtype)
        y = native.linear(problem(w, x, out=F32), x, w, None)
        assert worst_row(y, exact(x, w, None, WEIGHT_ONLY)) < 1e-6


@pytest.mark.parametrize("shape", [(1, 300), (2, 3, 300), (300,)])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_a_bound_call_is_the_same_call(isa, shape, dtype):
    w, bias = reference.quantize(torch.randn(40, 300), get_format("fp8_128x128")), torch.randn(40)
    x = torch.randn(*shape, dtype=dtype)
    p, flat = problem(w, x), x.view(-1, 300)
    y = Linear().bind(p)(x, w.data, w.scale, None, None, bias, flat.shape[0])
    assert y.shape == (*shape[:-1], 40)
    assert torch.equal(y.view(-1, 40), Linear().run(p, flat, w, bias))


@pytest.mark.parametrize("m", [1, 5])
def test_flush_denormal_changes_no_result_and_stays_set(isa, m):
    w = BlockScaled(torch.full((1, 128), 2.0**-9).to(torch.float8_e4m3fn), torch.ones(1, 1), get_format("fp8_128x128"))
    x = torch.ones(m, 128)
    assert torch.set_flush_denormal(True)
    try:
        y = native.linear(problem(w, x), x, w, None)
        assert (torch.tensor([1e-40]) * 1.0).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert y.tolist() == [[0.25]] * m


@pytest.mark.parametrize("name", ["fp8_128x128", "mxfp4", "nvfp4"])
def test_grouped_linear_skips_idle_experts_and_zeroes_what_is_left(isa, name):
    x = torch.randn(11, 200)
    w = reference.quantize(torch.randn(4, 70, 200), get_format(name))
    offsets = torch.tensor([2, 2, 9, 10], dtype=torch.int32)
    y = native.grouped_linear(problem(w, x, op="grouped_linear"), x, w, offsets)
    for expert, rows in ((0, slice(0, 2)), (2, slice(2, 9)), (3, slice(9, 10))):
        assert worst_row(y[rows], exact(x[rows], w[expert], None, WEIGHT_ONLY)) < 1e-6
    assert torch.equal(y[10:], torch.zeros(1, 70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_dense_linear_is_exact_in_fp32(isa, dtype, m):
    x, w, bias = (torch.randn(*s).to(dtype) for s in ((m, 333), (70, 333), (70,)))
    p = Problem("dense_linear", 70, 333, dtype, None, out_dtype=F32, w_dtype=dtype)
    y = native.dense_linear(p, x, w, bias)
    assert worst_row(y, x.double() @ w.double().T + bias.double()) < 1e-6


# -- quantize: the reference's bytes -----------------------------------------------------------------------------


def same_bytes(a, b):
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and torch.equal(
        a.scale.view(torch.uint8), b.scale.view(torch.uint8)
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["fp8_1x128", "fp8_128x128", "fp8_32x32_ue8m0", "fp8_1x32_ue8m0", "mxfp8", "fp8_row", "fp8_tensor", "fp8e5m2_1x64"],
)
def test_quantize_has_the_bytes_of_the_reference(isa, name, dtype):
    fmt = get_format(name)
    x = (torch.randn(130, 173) * torch.randn(130, 1).exp() * 3).to(dtype)
    x[0, 3], x[1, 2], x[2], x[2, 1] = torch.nan, -torch.inf, 0, -0.0
    for rounding in (None, "pow2_ceil", "pow2_floor"):
        p = Problem("quantize", 0, 173, dtype, fmt, out_dtype=dtype, scale_rounding=rounding)
        assert same_bytes(
            native.quantize(p, x, None, 1e-4), reference.quantize(x, fmt, scale_rounding=rounding, floor=1e-4)
        )
    given = torch.rand(fmt.scale_shape(130, 173)) * 1e-3 + 1e-5 if fmt.scale_dtype == F32 else None
    if given is not None:
        p = Problem("quantize", 0, 173, dtype, fmt, out_dtype=dtype, static=True)
        assert same_bytes(native.quantize(p, x, given, 1e-10), reference.quantize(x, fmt, scale=given))


@pytest.mark.parametrize("name", ["fp8_row", "fp8e5m2_row"])
def test_quantize_rounds_like_torch_at_every_tie_and_beside_it(isa, name):
    fmt = get_format(name)
    codes = (
        torch.arange(0x7C if fmt.element.name == "fp8e5m2" else 0x7F, dtype=torch.uint8).view(fmt.element.dtype).float()
    )
    ties = (codes[1:] + codes[:-1]) / 2
    near = [torch.nextafter(ties, torch.tensor(float(to))) for to in (torch.inf, -torch.inf)]
    sampled = torch.randint(-(2**31), 2**31, (1 << 14,)).to(torch.int32).view(F32)
    x = torch.cat([codes, ties, *near, torch.tensor([1e30, torch.inf, torch.nan]), sampled])
    x = torch.cat([x, -x])[None]
    p = Problem("quantize", 0, x.shape[1], F32, fmt, out_dtype=F32, static=True)
    one = torch.ones(1, 1)
    assert same_bytes(native.quantize(p, x, one, 1e-10), reference.quantize(x, fmt, scale=one))


@pytest.mark.parametrize("rounding", ["none", "pow2_ceil", "pow2_floor"])
@pytest.mark.parametrize("name", ["fp8_1x128", "fp8e5m2_1x128"])
def test_quantize_has_the_bytes_of_the_reference_for_every_bf16_mantissa(isa, name, rounding):
    """Every magnitude up to every largest one, of both signs: quotients on a tie, beside one, and subnormal ones.

    The largest lie where fp32 begins, where the quantizer turns from one way of coding to the other, and where it ends.
    """
    fmt = get_format(name)
    for exponent in (1, 33, 34, 41, 42, 127, 254):
        largest = (exponent << 7) + torch.arange(128, dtype=torch.int32)
        below = largest[:, None] - torch.arange(20 * 127, dtype=torch.int32)  # 20 exponents down
        blocks = torch.cat([below.clamp_min(0).view(128, 20, 127), largest[:, None, None].expand(128, 20, 1)], 2)
        blocks[..., ::3] |= 0x8000
        x = blocks.to(torch.int16).view(torch.bfloat16).view(-1, 128)
        p = Problem("quantize", 0, 128, x.dtype, fmt, out_dtype=x.dtype, scale_rounding=rounding)
        assert same_bytes(
            native.quantize(p, x, None, 0.0), reference.quantize(x, fmt, scale_rounding=rounding, floor=0.0)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp8_1x128", "fp8_1x32_ue8m0", "mxfp8", "fp8e5m2_1x64"])
def test_quantize_takes_blocks_of_nothing_but_special_numbers(isa, name, dtype):
    fmt = get_format(name)
    x = torch.tensor(
        [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 2.0**-133, -(2.0**-126), 2.0**-99, 1.0, torch.finfo(dtype).max]
    ).to(dtype)
    x = torch.cat([x[:, None].expand(-1, 256), torch.stack([x, x.flip(0)], 1).repeat(1, 128)])
    p = Problem("quantize", 0, 256, dtype, fmt, out_dtype=dtype)
    for floor in (0.0, 1e-10, 3e38):
        assert same_bytes(native.quantize(p, x, None, floor), reference.quantize(x, fmt, floor=floor))


# -- the process around it ---------------------------------------------------------------------------------------


def test_threads_follow_torch_and_change_no_bit(isa):
    x = torch.randn(70, 512)
    w = reference.quantize(torch.randn(256, 512), get_format("fp8_128x128"))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert native.threads() == threads
            results.append((native.linear(problem(w, x), x, w, None), native.linear(problem(w, x[:2]), x[:2], w, None)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_forked_child_works_on_one_thread_and_there_is_one_openmp():
    script = """
        import os, re, torch
        from blockscale import linear, quantize
        from blockscale.kernels.cpu import native
        torch.set_num_threads(2)
        x, w = torch.randn(64, 512), quantize(torch.randn(512, 512), "fp8_128x128")
        y = linear(x, w)  # wakes the pool
        maps = open("/proc/self/maps").read()
        assert len(set(re.findall(r"\\S*(?:libgomp|libomp|libiomp)\\S*", maps))) == 1
        child = os.fork()
        if child == 0:
            os._exit(0 if native.threads() == 1 and torch.equal(linear(x, w), y) else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    assert subprocess.run(run, timeout=120, check=False).returncode == 0


def test_the_check_itself_notices_a_wrong_row():
    x, w = torch.randn(8, 256), reference.quantize(torch.randn(64, 256), get_format("fp8_128x128"))
    y, want = native.linear(problem(w, x), x, w, None), exact(x, w, None, WEIGHT_ONLY)
    assert worst_row(y, want) < 1e-6
    y[5] = 0
    assert worst_row(y, want) == 1


def test_says_why_not():
    w = reference.quantize(torch.randn(64, 192), get_format("fp8_96x96"))
    p = problem(w, torch.randn(1, 192))
    assert reasons(Linear(), p, "cpu:avx2") == [
        "the native library is not built: install a C++ compiler (g++) and reinstall blockscale",
        "block is 96 columns wide, needs 4, 8, 16, 32 or a multiple of 64",
    ]
    assert reasons(Linear(), p, "cuda:sm_90")[0] == "runs on cpu, not on cuda"
    nvfp4 = Problem("linear", 64, 192, F32, get_format("nvfp4"), out_dtype=F32, numerics=Numerics())
    assert reasons(Linear(), nvfp4, "cpu:avx2+cpu-native=avx2") == ["quantizes x to E4M3 or E5M2, not to nvfp4"]
    dense = Problem("dense_linear", 64, 192, F32, None, out_dtype=F32, w_dtype=torch.float64)
    assert reasons(DenseLinear(), dense, "cpu:avx2+cpu-native=avx2") == [
        "weight is torch.float64, needs float32, bfloat16 or float16"
    ]


def test_an_unknown_instruction_set_names_the_variable_and_what_it_takes(monkeypatch):
    monkeypatch.setenv("BLOCKSCALE_CPU_ISA", "sse9")
    native.library.cache_clear()
    try:
        with pytest.raises(BlockscaleError, match=r"'sse9'.*BLOCKSCALE_CPU_ISA needs \w+ here or one below"):
            native.library()
    finally:
        native.library.cache_clear()
