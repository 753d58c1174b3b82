"""Dense multiplication against the fp64 reference: worst row, poisoned memory, and faults that must show."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from blockscale import layouts, reference
from blockscale.conformance import Case, check
from blockscale.formats import get_format
from blockscale.kernels.triton import KERNELS, exact, gemm, operands, tma_kernels
from blockscale.kernels.triton.dense_kernels import dense_kernel
from blockscale.kernels.triton.tma_kernels import rescaled
from blockscale.numerics import get_numerics
from blockscale.tensor import BlockScaled
from blockscale.tuning import GemmTile, gemm_tile

F16, F32 = torch.float16, torch.float32
EXACT = 3e-7
"""fp32 sums of a few hundred products, relative to the row."""


def worst_row(y, want):
    assert torch.isfinite(y).all()
    return float(((y.double() - want.double()).norm(dim=1) / want.double().norm(dim=1)).max())


FORMATS = [
    ("fp8_128x128", "checkpoint", F16), ("fp8_128x128_ue8m0", "deepseek_v4", F16), ("fp8_128x128", "weight_only", F32),
    ("fp8_32x32_ue8m0", "deepseek_v4_1", F16), ("fp8_48x80", "checkpoint", F16), ("fp8_row", "checkpoint", F32),
    ("fp8_tensor", "checkpoint", F32), ("fp8e5m2_128x128", "checkpoint", F32), ("fp8fnuz_128x128", "checkpoint", F32),
    ("mxfp8", "checkpoint", F32), ("mxfp4", "checkpoint", F32), ("mxfp4", "deepseek_v4", F32),
    ("mxfp4", "weight_only", F16), ("nvfp4", "checkpoint", F32), ("nvfp4", "weight_only", F16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "policy", "dtype"), FORMATS)
def test_formats(name, policy, dtype, platform, g):
    """N and K ragged against every tile and block."""
    assert_right(name, policy, dtype, (3, 72, 304), platform, g)


@pytest.mark.parametrize(("name", "policy", "dtype"), [FORMATS[i] for i in (0, 3, 4, 5, 12)])
def test_many_rows(name, policy, dtype, platform, g):
    """More rows than one tile of the interpreter holds, ragged M."""
    assert_right(name, policy, dtype, (40, 40, 160), platform, g)


def assert_right(name, policy, dtype, shape, platform, g):
    m, n, k = shape
    numerics = get_numerics(policy)
    w = reference.quantize(torch.randn(n, k, generator=g), get_format(name))
    x, bias = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
    y = gemm.linear(x, w, bias, numerics, F32, platform)
    assert worst_row(y, reference.linear(x.float(), w, bias, numerics=numerics)) < EXACT


@pytest.mark.parametrize(("name", "unit"), [("fp8_128x128", 128), ("fp8_48x80", 48), ("fp8_row", 8), ("fp8_tensor", 8)])
def test_slices_of_decoded_rows(name, unit, platform, g, monkeypatch):
    """Ragged N in slices of one block: each slice meets its own scales, its own part of the bias and of y."""
    w = reference.quantize(torch.randn(2 * unit + 5, 160, generator=g), get_format(name))
    xq = reference.quantize(torch.randn(3, 160, generator=g), get_numerics("checkpoint").activation_format(w.format))
    bias = torch.randn(2 * unit + 5, generator=g)
    monkeypatch.setattr(gemm, "DECODE_FIRST", 1)
    whole = gemm.matmul(xq, w, platform, bias=bias, out_dtype=F32)
    monkeypatch.setattr(gemm, "decoded_rows", lambda *_: unit)
    assert torch.equal(gemm.matmul(xq, w, platform, bias=bias, out_dtype=F32), whole)
    assert worst_row(whole, reference.matmul(xq, w) + bias) < EXACT


@triton.jit
def rescaled_kernel(x, w, y, right, sx, sw, M, K, sx_m, sx_k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    sums, ok = rescaled(x, w, sx, sw, M, K, sx_m, sx_k, 1, 0, 0, "float", BM, BN, BK, 1)
    tl.store(y + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], sums)
    tl.store(right, ok.to(tl.int32))


SCALES = [
    ("as they are", 1.0, True), ("ten orders apart", 1e-10, True), ("zero", 0.0, False), ("infinite", torch.inf, False),
    ("too far apart", 2.0**90, False), ("negative", -1.0, False), ("NaN", torch.nan, False),
]  # fmt: skip


@pytest.mark.parametrize(("factor", "right"), [case[1:] for case in SCALES], ids=[case[0] for case in SCALES])
def test_one_sum_in_units_of_the_scale_at_hand(factor, right, g):
    """Right, or known not to be."""
    xq = reference.quantize(torch.randn(20, 640, generator=g), get_format("fp8_1x128"))
    w = reference.quantize(torch.randn(32, 640, generator=g), get_format("fp8_128x128"))
    xq.scale[7, 2] *= factor
    y, ok = torch.empty(32, 32), torch.zeros(1, dtype=torch.int32)
    blocks = [gemm._blocks(q.data.to(F16), 32, 64) for q in (xq, w)]
    rescaled_kernel[(1,)](*blocks, y, ok, xq.scale, w.scale, 20, 640, *xq.scale.stride(), BM=32, BN=32, BK=64)
    assert bool(ok) == right
    rows = torch.arange(20) != (20 if right else 7)
    assert worst_row(y[:20][rows], reference.matmul(xq, w)[rows]) < EXACT


@triton.jit
def added(acc, part, scale):
    """`ptx.add_scaled_ptx`, which is NVIDIA's assembly."""
    return acc + part * scale


WAYS = [(1, False, 1), (2, False, 1), (1, True, 1), (1, True, 0.0), (1, True, torch.inf)]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("halves", "rescaled", "factor"), WAYS)
def test_block_copies(halves, rescaled, factor, persistent, g, monkeypatch):
    """Ragged M, N and K in tiles of 32; where one row's scale forbids rescaling, its tile goes the other way."""
    monkeypatch.setattr(tma_kernels, "add_scaled_ptx", added)
    xq = reference.quantize(torch.randn(70, 336, generator=g), get_format("fp8_1x128"))
    w = reference.quantize(torch.randn(40, 336, generator=g), get_format("fp8_128x128"))
    xq.scale[40, 1] *= factor
    y, bias, x = torch.full((70, 40), torch.nan), torch.randn(40, generator=g), xq.data.to(F16)
    whole, part, rows = (gemm._blocks(q, n, 64) for q, n in ((x, 32), (x, 16), (w.data.to(F16), 32)))
    tma_kernels.tma_kernel[(2 if persistent else 6,)](
        whole if rescaled else None, part if rescaled or halves == 2 else whole, rows, y, bias, xq.scale, w.scale,
        None, None, 70, 40, 336, 40, *xq.scale.stride(), *w.scale.stride(), SW_KIND="float", BIAS=True, BM=32, BN=32,
        BK=64, SPLIT=1, SWAP=False, HALVES=halves, RESCALED=rescaled, GROUP_M=8, STAGES=1, PERSISTENT=persistent,
    )  # fmt: skip
    good = torch.arange(70) != (40 if factor == torch.inf else 70)
    assert worst_row(y[good], (reference.matmul(xq, w) + bias)[good]) < EXACT
    if factor == torch.inf:
        assert not torch.isfinite(y[40]).any()


GROUPS = [
    ("fp8_1x80", "mxfp4"), ("fp8_1x80", "mxfp8"), ("mxfp8", "fp8_128x48"), ("fp8_1x24", "nvfp4"), ("fp8_1x81", "mxfp8"),
    ("fp8_1x64_ue8m0", "fp8_128x48"), ("fp8_1x64_ue8m0", "mxfp4"), ("nvfp4", "fp8_64x64_ue8m0"), ("fp8_1x96", "nvfp4"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "name"), GROUPS)
def test_groups_of_two_operands_that_do_not_divide_each_other(act, name, platform, g):
    """A scale is folded into an operand only where each of the loop's steps starts at one of its groups."""
    xq, w = (reference.quantize(torch.randn(n, 192, generator=g), get_format(f)) for n, f in ((3, act), (24, name)))
    assert worst_row(gemm.matmul(xq, w, platform, out_dtype=F32), reference.matmul(xq, w)) < EXACT


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("split", [1, 3])
def test_split_and_swap(swap, split, platform, g):
    w = reference.quantize(torch.randn(72, 640, generator=g), get_format("fp8_128x128"))
    x = torch.randn(5, 640, generator=g)
    tile = replace(gemm_tile("codec", 5, 72, 640, 128, platform), split=split, swap=swap, bn=32)
    xq = reference.quantize(x, get_format("fp8_1x128"))
    tickets = torch.zeros(3, dtype=torch.int32)
    y = gemm.matmul(xq, w, platform, out_dtype=F32, tile=tile, tickets=tickets)
    assert worst_row(y, reference.matmul(xq, w)) < EXACT
    assert tickets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("layout", ["row", "col_scales", "tma"])
@pytest.mark.parametrize(("act", "name"), [("fp8_1x128", "fp8_128x128"), ("fp8_row",) * 2, ("fp8_tensor",) * 2])
def test_layouts_of_x(act, name, layout, platform, g):
    xq = reference.quantize(torch.randn(5, 200, generator=g), get_format(act))
    w = reference.quantize(torch.randn(40, 200, generator=g), get_format(name))
    y = gemm.matmul(layouts.convert(xq, layout), w, platform, out_dtype=F32)
    assert worst_row(y, reference.matmul(xq, w)) < EXACT


@pytest.mark.parametrize("policy", ["checkpoint", "weight_only"])
def test_fnuz_weights_keep_the_numerics_of_the_checkpoint(policy, platform, g):
    """Re-encoded weights and activations: half the value, twice the scale, -0 and NaN codes elsewhere."""
    numerics = get_numerics(policy)
    w = reference.quantize(torch.randn(40, 256, generator=g), get_format("fp8_128x128"))
    w.data.view(torch.uint8)[:, ::5] = 0x80
    x = torch.randn(5, 256, generator=g)
    x[:, 3] = -0.0
    y = gemm.linear(x, layouts.convert(w, "fnuz"), None, numerics, F32, platform)
    assert worst_row(y, reference.linear(x, w, numerics=numerics)) < EXACT
    x[2, 7] = torch.inf
    y = gemm.linear(x, layouts.convert(w, "fnuz"), None, get_numerics("checkpoint"), F32, platform)
    assert y[2].isnan().all()
    assert torch.isfinite(y[[0, 1, 3, 4]]).all()


def test_a_row_has_the_same_bytes_in_every_batch_where_that_was_ordered(platform, g):
    numerics = get_numerics("checkpoint")
    w = reference.quantize(torch.randn(20, 384, generator=g), get_format("fp8_128x128"))
    x = torch.randn(66, 384, generator=g)
    rows = [gemm.linear(x[:m], w, None, numerics, F32, platform, invariant=True)[0] for m in (1, 33, 66)]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_bytes_decoded_beforehand_give_the_same_result(platform, g, monkeypatch):
    w = reference.quantize(torch.randn(40, 256, generator=g), get_format("fp8_128x128"))
    xq = reference.quantize(torch.randn(5, 256, generator=g), get_format("fp8_1x128"))
    tile = gemm_tile("decoded", 100, 40, 256, 128, platform)
    assert operands.reading(xq, w, platform).path == "codec"
    assert operands.reading(xq, w, platform, decode_first=True).path == "decoded"
    in_the_loop = gemm.matmul(xq, w, platform, out_dtype=F32, tile=tile)
    monkeypatch.setattr(gemm, "DECODE_FIRST", 1)
    assert torch.equal(gemm.matmul(xq, w, platform, out_dtype=F32, tile=tile), in_the_loop)


SHORT = [
    ("fp8_32x32_ue8m0", "deepseek_v4_1"), ("mxfp8", "checkpoint"), ("mxfp4", "deepseek_v4"), ("nvfp4", "checkpoint"),
    ("fp8_1x64_ue8m0", "checkpoint"), ("fp8_128x128_ue8m0", "deepseek_v4_1"), ("mxfp8", "weight_only"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "policy"), SHORT)
def test_weights_decoded_with_their_scales(name, policy, platform, g, monkeypatch):
    """Ragged N and K, in slices of one block and at once: the loop's numbers, and a NaN scale stays in its rows."""
    numerics = get_numerics(policy)
    w = reference.quantize(torch.randn(133, 304, generator=g), get_format(name))
    w.scale.view(torch.uint8)[1, 2] = 255 if w.scale.dtype == torch.float8_e8m0fnu else 0x7F
    x, bias = torch.randn(3, 304, generator=g), torch.randn(133, generator=g)
    in_the_loop = gemm.linear(x, w, bias, numerics, F32, platform)
    monkeypatch.setattr(gemm, "DECODE_FIRST", 1)
    first = gemm.linear(x, w, bias, numerics, F32, platform)
    monkeypatch.setattr(gemm, "decoded_rows", lambda *_: w.format.block[0])
    want = reference.linear(x, w, bias, numerics=numerics)
    good = ~want.isnan().any(0)
    assert 0 < good.sum() < 133
    for y in (in_the_loop, first, gemm.linear(x, w, bias, numerics, F32, platform)):
        assert torch.equal(y.isnan(), want.isnan())
        assert worst_row(y[:, good], want[:, good]) < EXACT


@pytest.mark.parametrize(("name", "policy"), [case for case in SHORT if case[1] != "weight_only"])
def test_quantized_operands_of_short_groups(name, policy, platform, g):
    """Activations that come quantized are decoded with their scales: what `linear` multiplies."""
    w = reference.quantize(torch.randn(40, 304, generator=g), get_format(name))
    xq = reference.quantize(torch.randn(20, 304, generator=g), get_numerics(policy).activation_format(w.format))
    assert isinstance(operands.held(xq, w, platform), operands.Values)
    assert worst_row(gemm.matmul(xq, w, platform, out_dtype=F32), reference.matmul(xq, w)) < EXACT


def test_a_floor_that_bf16_could_not_hold_keeps_scales_apart(platform, g):
    fmt = get_format("fp8_1x32_ue8m0")
    w = reference.quantize(torch.randn(40, 64, generator=g), get_format("fp8_32x32_ue8m0"))
    for floor, kind in ((1e-10, operands.Values), (1e-35, BlockScaled)):
        numerics = replace(get_numerics("checkpoint"), act_floor=floor)
        assert isinstance(operands.quantize_activations(torch.randn(3, 64), fmt, w, numerics, platform), kind)


@pytest.mark.parametrize("levels", [False, True])
def test_block_copies_of_values(levels, g):
    """Ragged M, N and K in tiles of 32."""
    x, w, bias = torch.randn(70, 336, generator=g), torch.randn(40, 336, generator=g), torch.randn(40, generator=g)
    one, two = torch.tensor(0.5), torch.tensor(3.0)
    y = torch.full((70, 40), torch.nan)
    dense_kernel[(6,)](
        gemm._blocks(x, 32, 64), gemm._blocks(w, 32, 64), y, bias, one, two, 70, 40, 336, 40, BIAS=True,
        X_LEVEL=levels, W_LEVEL=levels, BM=32, BN=32, BK=64, GROUP_M=8, STAGES=1,
    )  # fmt: skip
    assert worst_row(y, x.double() @ w.double().T * (1.5 if levels else 1) + bias) < EXACT


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("name", "policy"), SHORT[:5])
def test_weights_decoded_in_registers(name, policy, split, platform, g, monkeypatch):
    """Shuffled activations, with pointers and with block copies: ragged M and N, K of whole 32 but no whole step."""
    monkeypatch.setattr(exact, "shuffles", lambda *_: True)
    numerics, tile = get_numerics(policy), GemmTile(16, 32, 64, 4, 1, "test", split=split, swap=True)
    monkeypatch.setattr(exact, "folded_tile", lambda *_: tile)
    w = reference.quantize(torch.randn(72, 352, generator=g), get_format(name))
    x, bias = torch.randn(35, 352, generator=g), torch.randn(72, generator=g)
    want = reference.linear(x, w, bias, numerics=numerics)
    assert worst_row(gemm.linear(x, w, bias, numerics, F32, platform), want) < EXACT
    seen = []
    monkeypatch.setattr(gemm, "_takes_tma", lambda x, *_: seen.append(x.shuffled) or True)
    assert worst_row(gemm.linear(x, w, bias, numerics, F32, platform), want) < EXACT
    assert seen == [True]


CONFORMANCE = [
    Case("linear", "fp8_128x128", 5, 130, 384, F32, edge=e)
    for e in ("bias", "zero_row", "tiny", "large", "nan_row", "all_codes", "strided")
] + [
    Case("linear", name, 5, 130, 384, F32, policy, e)
    for name, policy in (("fp8_32x32_ue8m0", "checkpoint"), ("mxfp8", "checkpoint"), ("mxfp8", "weight_only"))
    for e in ("tiny", "large", "nan_row", "all_codes", "nan_weight", "nan_scale", "tiny_scale", "f32_scales")
] + [
    Case("linear", "fp8_32x32_ue8m0", 3, 192, 576, F32), Case("linear", "mxfp8", 3, 192, 576, F32),
    Case("linear", "fp8_1x128", 3, 192, 576, F16), Case("linear", "fp8_tensor", 3, 192, 576, F16),
    Case("grouped_linear", "fp8_128x128", 9, 192, 384, F32, groups=5),
    Case("grouped_linear", "mxfp4", 9, 192, 384, F32, groups=5),
    Case("grouped_linear", "nvfp4", 9, 192, 384, F32, "weight_only", groups=5),
    Case("matmul", "nvfp4", 3, 192, 576, F32), Case("matmul", "fp8_row", 33, 130, 256, F32),
    Case("quantize", "fp8_1x128", 5, 0, 384, F32, edge="ties"), Case("quantize", "mxfp4", 5, 0, 384, F32, edge="ties"),
    Case("quantize", "nvfp4", 5, 0, 384, F32, edge="nonfinite"),
    Case("quantize", "fp8_row", 5, 0, 384, F32, edge="tiny"),
    Case("swiglu_quantize", "fp8_1x128", 3, 0, 576, F16), Case("rmsnorm_quantize", "fp8_1x32_ue8m0", 3, 0, 576, F16),
]  # fmt: skip


@pytest.mark.parametrize("case", CONFORMANCE, ids=str)
def test_conformance_cases(case):
    kernel = next(k for k in KERNELS if k.op == case.op and k.name == "triton.block")
    failure, error = check(kernel, case)
    assert failure is None
    assert error <= 1
