import pytest
import torch

from blockscale import LAYOUTS, DtypeError, ScaleError, ShapeError, UnknownNameError, convert, get_format, reference
from blockscale.layouts import decode_scale, encode_e8m0, get_layout, scale_view
from blockscale.tensor import BlockScaled

SHAPES = [(128, 128), (256, 256), (192, 576), (1, 128), (129, 130), (5, 1024)]


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["fp8_128x128", "fp8_1x128", "fp8_1x128_ue8m0", "fp8_32x32_ue8m0", "fp8_row", "mxfp8"])
@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.lossless])
def test_lossless_layouts_round_trip(layout, name, shape):
    q = reference.quantize(torch.randn(shape), get_format(name))
    needs = {"tma": torch.float32, "ue8m0x4": torch.float8_e8m0fnu}.get(layout)
    if needs not in (None, q.scale.dtype):
        with pytest.raises(DtypeError, match="needs"):
            convert(q, layout)
        return
    packed = convert(q, layout)
    assert packed.layout == layout
    assert packed.data.is_contiguous()
    assert packed.scale.is_contiguous()
    back = convert(packed, "row")
    assert same_bytes(back.data, q.data)
    assert same_bytes(back.scale, q.scale)


def test_stacked_tensors_round_trip():
    q = reference.quantize(torch.randn(3, 192, 256), get_format("fp8_128x128"))
    for layout in ("kn", "col_scales", "tma"):
        back = convert(convert(q, layout), "row")
        assert same_bytes(back.data, q.data)
        assert same_bytes(back.scale, q.scale)


def test_physical_shapes():
    q = reference.quantize(torch.randn(6, 640), get_format("fp8_1x128"))
    assert tuple(convert(q, "kn").data.shape) == (640, 6)
    assert tuple(convert(q, "col_scales").scale.shape) == (5, 6)
    assert tuple(convert(q, "tma").scale.shape) == (5, 8)
    u = reference.quantize(torch.randn(6, 640), get_format("fp8_1x128_ue8m0"))
    assert tuple(convert(u, "ue8m0x4").scale.shape) == (2, 8)


def test_tma_scales_have_strides_1_and_round_up_4():
    q = reference.quantize(torch.randn(6, 640), get_format("fp8_1x128"))
    view = scale_view(convert(q, "tma"))
    assert view.stride() == (1, 8)
    assert torch.equal(view, q.scale)


def test_ue8m0x4_packs_the_first_scale_lowest():
    exponents = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    data = torch.zeros(1, 640).to(torch.float8_e4m3fn)
    q = BlockScaled(data, encode_e8m0(exponents), get_format("fp8_1x128_ue8m0"))
    assert convert(q, "ue8m0x4").scale[:, 0].tolist() == [127 | 128 << 8 | 129 << 16 | (130 << 24) - 2**32, 131]


def test_fnuz_keeps_every_value_and_says_it_is_lossy():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    q = BlockScaled(codes, torch.tensor([[0.5], [3.0]]), get_format("fp8_1x128"))
    packed = convert(q, "fnuz")
    assert packed.data.dtype == torch.float8_e4m3fnuz
    value = packed.data.float() * packed.scale
    want = reference.dequantize(q)
    assert torch.equal(value.nan_to_num(7.0), want.nan_to_num(7.0))
    assert not LAYOUTS["fnuz"].lossless
    assert not same_bytes(convert(packed, "row").data, q.data)


def test_e8m0_decodes_right_at_both_ends():
    codes = torch.tensor([0x00, 0x01, 0x7F, 0xFE, 0xFF], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = decode_scale(codes)
    assert values[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert values[4].isnan()


def test_e8m0_round_trips_every_code():
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode_e8m0(decode_scale(codes.view(torch.float8_e8m0fnu))).view(torch.uint8), codes)


@pytest.mark.parametrize("value", [3.0, 0.0, -1.0, 1.5, float("inf"), 2.0**-128])
def test_e8m0_never_rounds(value):
    with pytest.raises(ScaleError, match="powers of two"):
        encode_e8m0(torch.tensor([1.0, value]))


def test_unknown_layout():
    with pytest.raises(UnknownNameError, match="'row'"):
        get_layout("rows")


@pytest.mark.parametrize(
    ("data", "scale", "error", "message"),
    [
        (torch.zeros(200, 256), torch.ones(2, 2), DtypeError, "data needs torch.float8_e4m3fn, got torch.float32"),
        (
            torch.zeros(200, 256).to(torch.float8_e4m3fn),
            torch.ones(1, 2),
            ShapeError,
            r"data \[200, 256\] needs scale \[2, 2\], got \[1, 2\]",
        ),
        (torch.zeros(200, 256).to(torch.float8_e4m3fn), torch.ones(2, 2).int(), DtypeError, "scale needs one of"),
        (torch.zeros(256).to(torch.float8_e4m3fn), torch.ones(2), ShapeError, "at least two dimensions"),
    ],
)
def test_parts_that_do_not_fit(data, scale, error, message):
    with pytest.raises(error, match=message):
        BlockScaled(data, scale, get_format("fp8_128x128"))
