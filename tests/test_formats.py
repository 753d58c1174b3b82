import pytest
import torch

from blockscale import FORMATS, UnknownNameError, get_format


@pytest.mark.parametrize(
    ("name", "dtype", "block", "rounding", "scale_dtype"),
    [
        ("fp8_tensor", torch.float8_e4m3fn, (None, None), "none", torch.float32),
        ("fp8_row", torch.float8_e4m3fn, (1, None), "none", torch.float32),
        ("fp8_128x128", torch.float8_e4m3fn, (128, 128), "none", torch.float32),
        ("fp8_128x128_ue8m0", torch.float8_e4m3fn, (128, 128), "pow2_ceil", torch.float8_e8m0fnu),
        ("fp8_32x32_ue8m0", torch.float8_e4m3fn, (32, 32), "pow2_ceil", torch.float8_e8m0fnu),
        ("fp8fnuz_1x128", torch.float8_e4m3fnuz, (1, 128), "none", torch.float32),
        ("fp8e5m2_1x32", torch.float8_e5m2, (1, 32), "none", torch.float32),
        ("mxfp8", torch.float8_e4m3fn, (1, 32), "pow2_floor", torch.float8_e8m0fnu),
        ("mxfp4", torch.uint8, (1, 32), "pow2_floor", torch.float8_e8m0fnu),
        ("nvfp4", torch.uint8, (1, 16), "none", torch.float8_e4m3fn),
        ("fp8_96x256", torch.float8_e4m3fn, (96, 256), "none", torch.float32),
    ],
)
def test_a_name_says_it_all(name, dtype, block, rounding, scale_dtype):
    fmt = get_format(name)
    assert (fmt.name, fmt.element.dtype, fmt.block, fmt.scale_rounding) == (name, dtype, block, rounding)
    assert fmt.scale_dtype == scale_dtype
    assert scale_dtype in fmt.scale_dtypes


@pytest.mark.parametrize("name", FORMATS)
def test_element_max_is_the_largest_finite_code(name):
    element = FORMATS[name].element
    if element.bits == 8:
        codes = torch.arange(256, dtype=torch.uint8).view(element.dtype).float()
        assert element.max == codes[codes.isfinite()].max()
        assert codes[element.nan].isnan()
        assert 2**element.max_exponent <= element.max < 2 ** (element.max_exponent + 1)


@pytest.mark.parametrize(
    ("name", "rows", "cols", "scales", "data"),
    [
        ("fp8_128x128", 576, 200, (5, 2), (576, 200)),
        ("fp8_tensor", 576, 200, (1, 1), (576, 200)),
        ("fp8_row", 576, 200, (576, 1), (576, 200)),
        ("mxfp4", 3, 200, (3, 7), (3, 100)),
        ("nvfp4", 3, 200, (3, 13), (3, 100)),
    ],
)
def test_shapes(name, rows, cols, scales, data):
    assert get_format(name).scale_shape(rows, cols) == scales
    assert get_format(name).data_shape(rows, cols) == data


@pytest.mark.parametrize("name", ["fp8_129", "fp8_0x128", "FP8_128x128", "int8_row", "mxfp4_ue8m0", ""])
def test_unknown_names_raise(name):
    with pytest.raises(UnknownNameError, match="unknown format"):
        get_format(name)


def test_the_error_names_the_nearest():
    with pytest.raises(UnknownNameError, match="'fp8_128x128'"):
        get_format("fp8_128_128")
