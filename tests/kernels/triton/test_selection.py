"""Which kernel serves which chip, how operands are read there and with which tile: tables of literal platforms."""

import subprocess
import sys

import pytest
import torch

from blockscale.formats import get_format
from blockscale.kernels.triton import capability
from blockscale.numerics import get_numerics
from blockscale.platform import Platform
from blockscale.registry import Problem, explain, select
from blockscale.tensor import BlockScaled
from blockscale.tuning import by_pointers, decoded_rows, gemm_tile, quantize_tile

CHIPS = {  # platform -> (native fp8 dot, native fp8 cast, native fp8 load, TMA)
    "cuda:sm_75": (False, False, False, False), "cuda:sm_80": (False, False, False, False),
    "cuda:sm_86": (False, False, False, False), "cuda:sm_89": (True, False, True, False),
    "cuda:sm_90": (True, True, True, True), "cuda:sm_100": (True, True, True, True),
    "cuda:sm_120": (True, True, True, False), "rocm:gfx90a": (False, False, False, False),
    "rocm:gfx942": (False, False, False, False), "rocm:gfx950": (True, False, False, False),
    "rocm:gfx1100": (False, False, False, False), "rocm:gfx1201": (True, False, False, False),
    "xpu:bmg": (False, False, False, False),
}  # fmt: skip


def problem(op="linear", name="fp8_128x128", layout="row", numerics="checkpoint", dtype=torch.bfloat16, **more):
    return Problem(op, 4096, 7168, dtype, get_format(name), layout, numerics=get_numerics(numerics), **more)


def weight(name, layout="row", n=256, k=512):
    fmt = get_format(name)
    dtype = torch.float8_e4m3fnuz if layout == "fnuz" else fmt.element.dtype
    data, scale = (
        torch.empty(fmt.data_shape(n, k), dtype=dtype),
        torch.empty(fmt.scale_shape(n, k), dtype=fmt.scale_dtype),
    )
    return BlockScaled.trusted(data, scale, fmt, layout, (n, k), torch.ones(()) if fmt.two_level else None)


@pytest.mark.parametrize("chip", CHIPS)
def test_capabilities(chip):
    p = Platform.parse(chip)
    checks = (capability.dot_element, capability.native_cast, capability.native_load)
    assert (*(check(p, "fp8") for check in checks), capability.has_tma(p)) == CHIPS[chip]
    assert capability.dot_element(p, "fp8fnuz") == (chip == "rocm:gfx942")
    assert not capability.native_cast(p, "fp8e5m2")


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", ["fp8_128x128", "fp8_32x32_ue8m0", "mxfp8", "mxfp4", "nvfp4", "fp8_row"])
def test_every_gpu_is_served_at_every_m(chip, name):
    plan = select(problem(name=name), Platform.parse(chip + "+triton=3.6.0"), kernel="triton")
    assert [(s.m_min, s.m_max) for s in plan.spans] == [(1, None)]
    wanted = "triton.fnuz" if chip == "rocm:gfx942" and name not in ("mxfp4", "nvfp4") else "triton.block"
    assert plan.spans[0].kernel.name == wanted


REFUSED = [
    ("cpu:avx2+triton=3.7.1", problem(), "Triton generates code for cuda, rocm, xpu, not for cpu"),
    ("cuda:sm_90", problem(), "needs triton 3.4 or newer, got none"),
    ("cuda:sm_90+triton=3.2.0", problem(), "needs triton 3.4 or newer, got 3.2.0"),
    ("cuda:sm_70+triton=3.6", problem(), "needs sm_75 or newer, got sm_70"),
    ("cuda:sm_90+triton=3.6", problem(dtype=torch.float64), "x is torch.float64, needs float32, bfloat16 or float16"),
    ("cuda:sm_90+triton=3.6", problem("grouped_linear", "fp8_tensor", groups=4),
     "activations in fp8_tensor need a scale over each expert's rows, this computes one for each row or group"),
    ("cuda:sm_90+triton=3.6", problem("quantize", "fp8_1x128", "kn"),
     "writes row, col_scales, tma, ue8m0x4, fnuz, not layout 'kn'"),
    ("cuda:sm_90+triton=3.6", problem("quantize", "fp8_1x128_ue8m0", "tma"),
     "layout 'tma' holds float32 scales, fp8_1x128_ue8m0 stores torch.float8_e8m0fnu"),
    ("cuda:sm_90+triton=3.6", problem("quantize", "mxfp4", static=True),
     "given scales: only 8-bit elements in layout 'row', got mxfp4 in 'row'"),
    ("cuda:sm_90+triton=3.6", problem("matmul", "mxfp4", x_format=get_format("fp8_1x81")),
     "fp8_1x81 has odd groups, and mxfp4 packs two elements in a byte"),
    ("cuda:sm_90+triton=3.6", problem("swiglu_quantize", "fp8_row"),
     "fuses with formats whose scale serves part of a row, not fp8_row"),
]  # fmt: skip


@pytest.mark.parametrize(("chip", "asked", "reason"), REFUSED)
def test_refusals_say_why(chip, asked, reason):
    decisions = {d.kernel.name: d.reasons for d in explain(asked, Platform.parse(chip), repack=False)}
    assert reason in decisions["triton.block"]


@pytest.mark.parametrize(("name", "op"), [("nvfp4", "linear"), ("fp8_tensor", "linear"), ("nvfp4", "grouped_linear")])
def test_invariant_kernels_refuse_scales_of_a_whole_batch(name, op):
    p = Platform.parse("cuda:sm_90+triton=3.6")
    reason = f"activations in {name}: their scale depends on the batch"
    for static, want in ((False, True), (True, False)):
        asked = problem(op, name, groups=0 if op == "linear" else 4, static=static)
        decisions = {d.kernel.name: d.reasons for d in explain(asked, p, repack=False)}
        assert (reason in decisions["triton.invariant"]) == want
        assert decisions["triton.block"] == ()


def test_fnuz_is_for_one_chip_only():
    decisions = {d.kernel.name: d.reasons for d in explain(problem(), Platform.parse("cuda:sm_90+triton=3.6"))}
    assert decisions["triton.fnuz"] == (
        "re-encodes for matrix instructions that take E4M3FNUZ, which sm_90 lacks",
    )  # fmt: skip


READ = [  # chip, activations, weight, layout -> path, x kind, w kind, x scale, w scale, span, compute
    ("cuda:sm_90", "fp8_1x128", "fp8_128x128", "native value value loop loop 128 float16"),
    ("cuda:sm_80", "fp8_1x128", "fp8_128x128", "codec value ptx checked loop loop 128 float16"),
    ("rocm:gfx90a", "fp8_1x128", "fp8_128x128", "codec value fp8 loop loop 128 float16"),
    ("cuda:sm_90", "mxfp8", "mxfp8", "weight_only value ptx none fold 0 bfloat16"),
    ("cuda:sm_80", "mxfp8", "mxfp8", "weight_only value ptx none fold 0 bfloat16"),
    ("cuda:sm_75", "mxfp8", "mxfp8", "codec value ptx checked loop loop 32 float16"),
    ("rocm:gfx950", "fp8_1x32_ue8m0", "fp8_32x32_ue8m0", "weight_only value fp8 none fold 0 bfloat16"),
    ("rocm:gfx942", "mxfp8", "mxfp8", "weight_only value fp8 none fold 0 bfloat16"),
    ("xpu:bmg", "mxfp8", "fp8_1x64_ue8m0", "weight_only value fp8 none loop 64 bfloat16"),
    ("cuda:sm_90", "fp8_1x128_ue8m0", "fp8_128x128_ue8m0", "native value value loop loop 128 float16"),
    ("cuda:sm_90", "fp8_1x128_ue8m0", "mxfp4", "weight_only value fp4 ptx none fold 0 bfloat16"),
    ("cuda:sm_90", "mxfp8", "fp8_128x128_ue8m0", "weight_only value ptx none loop 128 bfloat16"),
    ("cuda:sm_90", "mxfp8", "fp8_32x32", "native value value loop loop 32 bfloat16"),
    ("cuda:sm_90", "fp8_1x128", "mxfp4", "codec value fp4 ptx loop fold 128 bfloat16"),
    ("rocm:gfx950", "nvfp4", "nvfp4", "weight_only value fp4 none fold 0 float16"),
    ("cuda:sm_75", "nvfp4", "nvfp4", "weight_only value fp4 ptx none fold 0 float16"),
    ("cuda:sm_90", "fp8_row", "fp8_row", "native value value end end 0 float16"),
    ("rocm:gfx942", "fp8_1x128", "fp8_128x128", "codec value fp8 loop loop 128 float16"),
    ("cuda:sm_90", None, "fp8_128x128", "weight_only value ptx none loop 128 bfloat16"),
    ("cuda:sm_75", None, "fp8_128x128", "weight_only cast fp8 none loop 128 float32"),
    ("cuda:sm_80", "fp8_1x80", "mxfp4", "codec value fp4 ptx loop loop 16 bfloat16"),
    ("cuda:sm_80", "mxfp8", "fp8_128x48", "codec value ptx loop loop 16 bfloat16"),
    ("cuda:sm_80", "fp8_1x96", "fp8_64x80", "codec value ptx checked loop loop 16 float16"),
]  # fmt: skip


def read(x, w, platform, **more):
    """`reading`, where x's codes times their scales need only be thought of."""
    from blockscale.kernels.triton.operands import Values, reading

    if not isinstance(x, torch.Tensor):
        dtype = capability.common_dtype(x.format, x.scale.dtype, w.format, w.scale.dtype, platform)
        return reading(x if dtype is None else Values(x.data.new_empty(4, 512, dtype=dtype)), w, platform, **more)
    return reading(Values(x), w, platform, **more)


@pytest.mark.parametrize(("chip", "act", "name", "want"), READ)
def test_how_operands_are_read(chip, act, name, want):
    x, w, p = (
        torch.empty(4, 512, dtype=torch.bfloat16) if act is None else weight(act, n=4),
        weight(name),
        Platform.parse(chip),
    )
    how = read(x, w, p)
    c = how.constants
    got = f"{how.path} {c['X_KIND']} {c['W_KIND']} {c['X_SCALE']} {c['W_SCALE']} {c['SPAN']}"
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    assert f"{got} {names[str(c['COMPUTE'])]}" == want


FIRST = [  # chip, activations, weight -> path where weights may be decoded beforehand
    ("cuda:sm_90", "mxfp8", "mxfp8", "dense"), ("cuda:sm_90", "fp8_1x128_ue8m0", "mxfp4", "dense"),
    ("cuda:sm_80", "nvfp4", "nvfp4", "dense"), ("cuda:sm_90", None, "fp8_128x128_ue8m0", "dense"),
    ("cuda:sm_90", None, "fp8_128x128", "weight_only"),  # fp32 scales: a product has more bits than bf16
    ("cuda:sm_90", None, "fp8_row_ue8m0", "weight_only"), ("cuda:sm_75", None, "mxfp8", "weight_only"),
    ("cuda:sm_80", "fp8_1x128", "fp8_128x128", "decoded"), ("cuda:sm_90", "fp8_1x128", "fp8_128x128", "native"),
]  # fmt: skip


@pytest.mark.parametrize(("chip", "act", "name", "path"), FIRST)
def test_weights_decoded_beforehand(chip, act, name, path):
    x = torch.empty(4, 512, dtype=torch.bfloat16) if act is None else weight(act, n=4)
    how = read(x, weight(name), Platform.parse(chip), decode_first=True)
    assert how.path == path
    if path == "dense":
        assert (how.constants["W_KIND"], how.constants["W_SCALE"], how.constants["LIFT"]) == ("value", "none", 1.0)


def test_fnuz_weights_and_activations_meet_native_instructions():
    from blockscale.kernels.triton.operands import reading

    how = reading(weight("fp8_1x128", "fnuz", n=4), weight("fp8_128x128", "fnuz"), Platform.parse("rocm:gfx942"))
    assert (how.path, how.constants["W_KIND"]) == ("native", "value")


TILES = [
    ("cuda:sm_90+sms=132", "tma", 1, 2112, 7168, (16, 64, 128, 8, True)),
    ("cuda:sm_90+sms=132", "tma", 16, 7168, 16384, (16, 64, 128, 2, True)),
    ("cuda:sm_90+sms=132", "tma", 64, 24576, 1536, (64, 128, 128, 1, True)),
    ("cuda:sm_90+sms=132", "tma", 4096, 7168, 16384, (128, 128, 128, 1, False)),
    ("cuda:sm_90+sms=132", "tma", 4096, 2112, 7168, (128, 64, 128, 1, False)),
    ("cuda:sm_90+sms=132", "tma16", 4096, 4096, 7168, (128, 128, 64, 1, False)),
    ("cuda:sm_90+sms=132", "native", 1, 2112, 7168, (8, 64, 128, 8, True)),
    ("cuda:sm_90+sms=132", "native", 1, 7168, 16384, (8, 64, 128, 1, True)),
    ("cuda:sm_90+sms=132", "native", 16, 2112, 7168, (16, 64, 128, 4, True)),
    ("cuda:sm_90+sms=132", "native", 16, 4096, 7168, (16, 64, 128, 2, True)),
    ("cuda:sm_90+sms=132", "native", 64, 4096, 7168, (64, 64, 128, 2, True)),
    ("cuda:sm_90+sms=132", "codec", 128, 4096, 7168, (64, 64, 128, 2, False)),
    ("cuda:sm_90+sms=132", "weight_only", 256, 4096, 7168, (128, 64, 128, 1, False)),
    ("cuda:sm_80+sms=108", "weight_only", 256, 2048, 7168, (64, 128, 128, 2, False)),
    ("cuda:sm_86", "weight_only", 4096, 4096, 7168, (64, 128, 128, 1, False)),
    ("cuda:sm_90+sms=132", "codec", 300, 4096, 7168, (64, 128, 128, 1, False)),
    ("cuda:sm_80", "decoded", 4096, 4096, 7168, (128, 128, 128, 1, False)),
    ("cuda:sm_90+sms=132", "codec", 1, 2112, 7168, (8, 64, 128, 8, True)),
    ("cuda:sm_90+sms=132", "codec", 16, 7168, 2048, (16, 64, 128, 1, False)),
    ("cuda:sm_80", "codec", 1, 4096, 7168, (8, 64, 128, 2, True)),
    ("cuda:sm_75", "codec", 4096, 4096, 7168, (64, 64, 32, 1, False)),
    ("rocm:gfx942", "native", 4096, 4096, 7168, (128, 128, 64, 1, False)),
    ("rocm:gfx1100", "codec", 1, 4096, 7168, (16, 64, 64, 2, False)),
    ("xpu:bmg", "codec", 4096, 4096, 7168, (64, 128, 32, 1, False)),
]


SLICES = [  # m, n, k, rows of a block -> rows decoded at a time on 132 multiprocessors
    (4096, 7168, 16384, 128, 1024),  # 32 MiB
    (4096, 4096, 7168, 128, 2048),  # slices alike
    (4096, 2112, 7168, 128, 2176), (512, 7168, 16384, 128, 7168),  # one slice
    (512, 129280, 7168, 128, 8192),  # two programs a multiprocessor, however much that is
    (4096, 7168, 16384, 48, 1152),  # whole blocks
    (4096, 64, 1 << 25, 128, 128),
]  # fmt: skip


@pytest.mark.parametrize(("m", "n", "k", "block", "want"), SLICES)
def test_slices_of_decoded_weights(m, n, k, block, want):
    assert decoded_rows(m, n, k, block, Platform.parse("cuda:sm_90+sms=132")) == want


def test_few_rows_take_pointers_where_that_was_measured():
    chips = ("cuda:sm_90", "cuda:sm_100", "cuda:sm_80", "rocm:gfx942")
    assert [by_pointers(16, 1 << 20, Platform.parse(chip)) for chip in chips] == [True, False, False, False]
    hopper = Platform.parse("cuda:sm_90+sms=132")
    asked = [(17, 8448), (64, 8448), (64, 8449), (65, 128)]
    assert [by_pointers(m, n, hopper) for m, n in asked] == [True, True, False, False]


@pytest.mark.parametrize(("chip", "path", "m", "n", "k", "want"), TILES)
def test_tiles(chip, path, m, n, k, want):
    tile = gemm_tile(path, m, n, k, 128, Platform.parse(chip))
    assert (tile.bm, tile.bn, tile.bk, tile.split, tile.swap) == want
    assert tile.entry


def test_an_invariant_tile_does_not_depend_on_m():
    p = Platform.parse("cuda:sm_90")
    tiles = {gemm_tile("tma", m, 4096, 7168, 128, p, invariant=True) for m in (1, 16, 64, 65, 128, 4096)}
    assert len(tiles) == 1
    assert tiles.pop().split == 1


def test_short_spans_cut_the_step():
    p = Platform.parse("cuda:sm_90")
    assert [gemm_tile("native", 512, 256, 512, span, p).bk for span in (0, 128, 32, 16, 80)] == [128, 128, 32, 32, 128]


def test_quantize_tiles_name_their_entry():
    p = Platform.parse("cuda:sm_90")
    few = quantize_tile(1, 56, 128, p, scales_by_column=False)
    many = quantize_tile(8192, 56, 128, p, scales_by_column=True)
    assert (few.rows, few.entry) == (1, "quantize: few rows")
    assert (many.rows, many.groups, many.warps, many.entry) == (8, 8, 8, "quantize: column scales")
    assert quantize_tile(8192, 56, 128, Platform.parse("rocm:gfx942"), scales_by_column=True).warps == 4


def test_triton_is_imported_only_when_a_kernel_runs():
    code = "import sys, blockscale; blockscale.registry.kernels(); assert 'triton' not in sys.modules, 'imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
