"""Code written for vLLM, SGLang or DeepGEMM, run by changing its import."""

import pytest
import torch

import blockscale
from blockscale import BlockscaleError, DtypeError, ScaleError, ShapeError
from blockscale.integrations import peers


def product(a, sa, b, sb):
    """The plain definition, in fp64, for 1x128 and 128x128 scales."""
    k = a.shape[1]
    x = a.double() * sa.double().repeat_interleave(128, 1)[:, :k]
    w = b.double() * sb.double().repeat_interleave(128, 0)[: b.shape[0]].repeat_interleave(128, 1)[:, :k]
    return x @ w.T


def test_group_quantize_and_block_matmul():
    x, w = torch.randn(2, 5, 384, dtype=torch.bfloat16), torch.randn(192, 384)
    a, sa = peers.per_token_group_quant_fp8(x, 128)
    b, sb = peers.per_block_cast_to_fp8(w, use_ue8m0=False)
    assert (a.shape, sa.shape, a.dtype) == ((2, 5, 384), (2, 5, 3), torch.float8_e4m3fn)
    y = peers.w8a8_block_fp8_matmul(a, b, sa, sb, [128, 128], torch.float32)
    want = product(a.reshape(10, 384), sa.reshape(10, 3), b, sb)
    torch.testing.assert_close(y.reshape(10, 192).double(), want, rtol=1e-4, atol=1e-3)
    assert peers.w8a8_triton_block_scaled_mm is peers.w8a8_block_fp8_matmul


@pytest.mark.parametrize(
    ("column", "tma", "strides"), [(False, False, (3, 1)), (True, False, (1, 6)), (True, True, (1, 8))]
)
def test_scale_strides(column, tma, strides):
    x = torch.randn(6, 384)
    _, scale = peers.per_token_group_quant_fp8(x, 128, column_major_scales=column, tma_aligned_scales=tma)
    assert scale.stride() == strides
    assert torch.equal(scale, blockscale.quantize(x, "fp8_1x128").scale)


def test_ue8m0_scales_are_fp32_powers_of_two():
    _, scale = peers.per_token_group_quant_fp8(torch.randn(6, 384), 128, use_ue8m0=True)
    assert scale.dtype == torch.float32
    assert (torch.frexp(scale).mantissa == 0.5).all()


def test_out_q_is_written_in_place():
    x = torch.randn(4, 256)
    out = torch.empty(4, 256, dtype=torch.float8_e4m3fn)
    q, _ = peers.per_token_group_quant_fp8(x, 128, out_q=out)
    assert q is out
    assert torch.equal(out.view(torch.uint8), blockscale.quantize(x, "fp8_1x128").data.view(torch.uint8))


@pytest.mark.parametrize(("shape", "scales"), [((-1, -1), (1, 1)), ((1, -1), (5, 1)), ((1, 128), (5, 2))])
def test_quant_fp8_dynamic(shape, scales):
    x = torch.randn(5, 256)
    q, s = peers.QuantFP8(False, shape)(x)
    assert tuple(s.shape) == scales
    s_full = s.repeat_interleave(5 // scales[0], 0).repeat_interleave(256 // scales[1], 1)
    assert ((q.float() * s_full - x).abs() <= x.abs() * 2**-4 + s_full * 2**-10).all()


def test_quant_fp8_static_and_padding():
    x = torch.randn(5, 256)
    q, s = peers.QuantFP8(True, (-1, -1), num_token_padding=17)(x, torch.tensor(0.02))
    assert q.shape == (17, 256)
    assert not q[5:].float().any()
    assert s.item() == torch.tensor(0.02).item()
    with pytest.raises(BlockscaleError, match="needs a scale"):
        peers.QuantFP8(True, (-1, -1))(x)
    with pytest.raises(BlockscaleError, match="group_shape"):
        peers.QuantFP8(False, (128, 128))
    with pytest.raises(BlockscaleError, match="scale_ub"):
        peers.QuantFP8(False, (1, -1))(x, scale_ub=torch.tensor(1.0))


def test_fp8_gemm_nt():
    a = peers.per_token_cast_to_fp8(torch.randn(5, 384), use_ue8m0=False)
    b = peers.per_block_cast_to_fp8(torch.randn(192, 384), use_ue8m0=False)
    d = torch.full((5, 192), torch.nan)
    peers.fp8_gemm_nt(a, b, d)
    torch.testing.assert_close(d.double(), product(*a, *b), rtol=1e-4, atol=1e-3)
    c = torch.randn(5, 192)
    peers.fp8_gemm_nt(a, b, d, c)
    torch.testing.assert_close(d.double(), product(*a, *b) + c, rtol=1e-4, atol=1e-3)


def test_rounding_scales_on_the_way_is_refused_unless_it_is_exact():
    a, b = torch.randn(5, 128), torch.randn(128, 128)
    d = torch.empty(5, 128)
    with pytest.raises(ScaleError, match="powers of two"):
        peers.fp8_gemm_nt(
            peers.per_token_cast_to_fp8(a, False), peers.per_block_cast_to_fp8(b, False), d, disable_ue8m0_cast=False
        )
    pow2 = peers.per_token_cast_to_fp8(a, True), peers.per_block_cast_to_fp8(b, True)
    peers.fp8_gemm_nt(*pow2, d, disable_ue8m0_cast=False)
    torch.testing.assert_close(d.double(), product(*pow2[0], *pow2[1]), rtol=1e-4, atol=1e-3)


@pytest.fixture
def experts():
    w = blockscale.quantize(torch.randn(3, 64, 128), "fp8_128x128")
    return w.data, w.scale


def test_grouped_contiguous_skips_padding(experts):
    a = peers.per_token_cast_to_fp8(torch.randn(6, 128), False)
    d = torch.full((6, 64), 7.0)
    m_indices = torch.tensor([0, 0, -1, 2, 2, -1], dtype=torch.int32)
    peers.m_grouped_fp8_gemm_nt_contiguous(a, experts, d, m_indices)
    for row, expert in enumerate(m_indices.tolist()):
        if expert < 0:
            assert d[row].tolist() == [7.0] * 64
        else:
            want = product(a[0][row : row + 1], a[1][row : row + 1], experts[0][expert], experts[1][expert])
            torch.testing.assert_close(d[row : row + 1].double(), want, rtol=1e-4, atol=1e-3)


def test_grouped_masked_leaves_the_rest(experts):
    q = blockscale.quantize(torch.randn(3, 4, 128), "fp8_1x128")
    d = torch.full((3, 4, 64), 7.0)
    peers.m_grouped_fp8_gemm_nt_masked((q.data, q.scale), experts, d, torch.tensor([2, 0, 4]), expected_m=2)
    for expert, count in enumerate([2, 0, 4]):
        assert (d[expert, count:] == 7.0).all()
        want = product(q.data[expert, :count], q.scale[expert, :count], experts[0][expert], experts[1][expert])
        torch.testing.assert_close(d[expert, :count].double(), want, rtol=1e-4, atol=1e-3)


def test_transform_sf():
    sf = torch.rand(6, 3)
    out = peers.transform_sf_into_required_layout(sf, 6, 384, (1, 128, 128), is_sfa=True)
    assert out.stride() == (1, 8)
    assert torch.equal(out, sf)
    weights = torch.rand(2, 3)
    assert torch.equal(peers.transform_sf_into_required_layout(weights, 192, 384, (1, 128, 128)), weights)
    with pytest.raises(ShapeError, match=r"needs scales \[6, 3\]"):
        peers.transform_sf_into_required_layout(sf[:5], 6, 384, (1, 128, 128), is_sfa=True)
    with pytest.raises(BlockscaleError, match="changes numerics"):
        peers.transform_sf_into_required_layout(sf, 6, 384, (1, 128, 128), is_sfa=True, disable_ue8m0_cast=False)


def test_bad_input():
    with pytest.raises(ShapeError, match="not a multiple"):
        peers.per_token_group_quant_fp8(torch.randn(2, 100), 128)
    with pytest.raises(DtypeError, match="float16"):
        peers.per_token_group_quant_fp8(torch.randn(2, 128), 128, dtype=torch.float16)
