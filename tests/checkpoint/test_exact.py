"""The rules of exact conversion, block by block: the same values in other blocks and other scales, or None."""

import pytest
import torch

from blockscale import BlockScaled, get_format, reference
from blockscale.checkpoint.exact import convert_exact, values

E8M0 = torch.float8_e8m0fnu


def mxfp4(data, exponents):
    scale = (torch.tensor(exponents) + 127).to(torch.uint8).view(E8M0)
    return BlockScaled(data, scale, get_format("mxfp4"))


def test_mxfp4_in_fp8_tiles_where_scales_lie_close():
    data = torch.randint(0, 256, (128, 64), dtype=torch.uint8)
    near = mxfp4(data, [[0, 1, -3, 2]] * 64 + [[4, 0, 0, -4]] * 64)
    out = convert_exact(near, get_format("fp8_128x128_ue8m0"))
    assert torch.equal(values(out), values(near))
    assert out.scale.view(torch.uint8).tolist() == [[127 + 4 - 6]]
    far = mxfp4(data, [[0, 1, -3, 2]] * 64 + [[20, 0, 0, -4]] * 64)
    assert convert_exact(far, get_format("fp8_128x128_ue8m0")) is None


def test_finer_blocks_repeat_scales():
    q = reference.quantize(torch.randn(200, 300), get_format("fp8_128x128"))
    out = convert_exact(q, get_format("fp8_32x64"))
    assert out.scale.shape == (7, 5)
    assert torch.equal(values(out), values(q))
    assert torch.equal(out.scale[:4, :2], q.scale[:1, :1].expand(4, 2))


def test_coarser_blocks_only_where_scales_agree():
    data = torch.ones(256, 128).to(torch.float8_e4m3fn)
    fine = get_format("fp8_128x128")
    assert convert_exact(BlockScaled(data, torch.tensor([[3.0], [3.0]]), fine), get_format("fp8_256x128")) is not None
    assert convert_exact(BlockScaled(data, torch.tensor([[3.0], [5.0]]), fine), get_format("fp8_256x128")) is None


def test_a_second_level_is_neither_invented_nor_folded():
    q = reference.quantize(torch.randn(32, 64), get_format("nvfp4"))
    assert convert_exact(q, get_format("fp8_1x16")) is None
    assert convert_exact(reference.quantize(torch.randn(32, 64), get_format("mxfp4")), get_format("nvfp4")) is None


@pytest.mark.parametrize("byte", [0, 1, 127, 254])
def test_e8m0_ends_convert_exactly(byte):
    scale = torch.full((1, 1), byte, dtype=torch.uint8).view(E8M0)
    q = BlockScaled(torch.ones(4, 32).to(torch.float8_e4m3fn), scale, get_format("fp8_32x32_ue8m0"))
    out = convert_exact(q, get_format("fp8_32x32"))
    assert out.scale.item() == 2.0 ** (byte - 127)
    assert convert_exact(out, get_format("fp8_32x32_ue8m0")).scale.view(torch.uint8).item() == byte
