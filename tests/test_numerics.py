import pytest

from blockscale import PRESETS, BlockscaleError, Numerics, UnknownNameError, get_format, get_numerics


@pytest.mark.parametrize(
    ("numerics", "weight", "activation"),
    [
        ("checkpoint", "fp8_128x128", "fp8_1x128"),
        ("checkpoint", "fp8_128x128_ue8m0", "fp8_1x128_ue8m0"),
        ("checkpoint", "fp8_32x32_ue8m0", "fp8_1x32_ue8m0"),
        ("checkpoint", "fp8_row", "fp8_row"),
        ("checkpoint", "fp8_tensor", "fp8_tensor"),
        ("checkpoint", "fp8e5m2_128x128", "fp8_1x128"),
        ("checkpoint", "mxfp8", "mxfp8"),
        ("checkpoint", "mxfp4", "fp8_1x32_ue8m0"),
        ("checkpoint", "nvfp4", "nvfp4"),
        ("deepseek_v3", "fp8_128x128_ue8m0", "fp8_1x128"),
        ("deepseek_v4", "fp8_128x128", "fp8_1x128_ue8m0"),
        ("deepseek_v4", "mxfp4", "fp8_1x128_ue8m0"),
        ("deepseek_v4_1", "fp8_32x32_ue8m0", "fp8_1x32_ue8m0"),
        ("weight_only", "fp8_128x128", None),
        ("checkpoint,mxfp4_act=None", "mxfp4", None),
    ],
)
def test_activation_format(numerics, weight, activation):
    fmt = get_numerics(numerics).activation_format(get_format(weight))
    assert (fmt and fmt.name) == activation


def test_v4_floors_amax_at_1e_4():
    assert PRESETS["deepseek_v4"].act_floor == 1e-4


@pytest.mark.parametrize("numerics", [*PRESETS.values(), Numerics(act_group=64, act_floor=1e-3, nvfp4_act=None)])
def test_text_round_trip(numerics):
    assert get_numerics(str(numerics)) == numerics


@pytest.mark.parametrize("text", ["fast", "checkpoint,speed=1"])
def test_unknown_text(text):
    with pytest.raises(UnknownNameError):
        get_numerics(text)


@pytest.mark.parametrize(
    "kwargs", [{"act_group": 0}, {"act_floor": 0.0}, {"act_rounding": "up"}, {"mxfp4_act": "int8"}]
)
def test_bad_policies_raise(kwargs):
    with pytest.raises(BlockscaleError):
        Numerics(**kwargs)
