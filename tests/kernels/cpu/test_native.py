"""`cpu.native` against the fp64 definition, for every instruction set that this processor has."""

import ctypes
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from blockscale import Platform, reference
from blockscale.formats import get_format
from blockscale.kernels.cpu import DenseLinear, Int16Linear, Linear, native
from blockscale.numerics import Numerics, get_numerics
from blockscale.registry import Problem, select
from blockscale.tensor import BlockScaled

pytestmark = pytest.mark.skipif(
    not native.PATH.exists() and shutil.which("g++") is None, reason="no C++ compiler, so no native library"
)
WEIGHT_ONLY = get_numerics("weight_only")
F32 = torch.float32


def usable() -> list[str]:
    if not native.PATH.exists():
        return ["not built"]
    library = ctypes.CDLL(str(native.PATH))  # by itself, so that collecting tests chooses nothing
    library.blockscale_isa.restype = ctypes.c_char_p
    best = library.blockscale_isa()
    names = [
        n for n in (b"avx512bf16", b"avx512", b"avx2", b"sse2", b"neon", b"generic") if library.blockscale_use(n) == 0
    ]
    library.blockscale_use(best)
    return [n.decode() for n in names]


@pytest.fixture(params=usable())
def isa(request):
    """Each instruction set in turn; the outputs it may write are full of NaN before."""
    library, before = native.library(), native.isa()
    assert library.blockscale_use(request.param.encode()) == 0
    yield request.param
    library.blockscale_use(before.encode())


@pytest.fixture
def poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).view(torch.uint8).fill_(0xFF).view(k["dtype"]))


def problem(w, x, numerics=WEIGHT_ONLY, out=None, op="linear"):
    n, k = w.shape[-2:]
    return Problem(op, n, k, x.dtype, w.format, out_dtype=out or x.dtype, numerics=numerics)


def worst_row(y, want):
    """Largest relative error of a row: a norm over everything would pass with whole rows wrong."""
    return ((y.double() - want).norm(dim=1) / want.norm(dim=1)).max().item()


def exact(x, w, bias, numerics):
    y = reference.activations(x, w, numerics).double() @ reference.dequantize(w).double().T
    return y if bias is None else y + bias.double()


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


def reasons(kernel, p, platform):
    return list(kernel.why_not(p, Platform.parse(platform)))


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


# -- cpu.int16: asked for by the numerics, held to its own bound ---------------------------------------------------


@pytest.fixture(params=[name for name in usable() if name.startswith("avx")])
def int16_isa(request):
    """Each instruction set that cpu.int16 is written for."""
    library, before = native.library(), native.isa()
    assert library.blockscale_use(request.param.encode()) == 0
    yield request.param
    library.blockscale_use(before.encode())


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
