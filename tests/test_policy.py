import pytest

from blockscale.errors import UnknownNameError
from blockscale.numerics import Numerics, get_numerics
from blockscale.policy import model_policy

V4 = {"model_type": "deepseek_v4", "quantization_config": {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}}
V41 = {"model_type": "deepseek_v4", "quantization_config": {"weight_block_size": [32, 32], "scale_fmt": "ue8m0"}}
V3 = {"model_type": "deepseek_v3", "quantization_config": {"weight_block_size": [128, 128]}}
V32 = {"model_type": "deepseek_v32", "quantization_config": {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}}
QWEN = {"model_type": "qwen3_moe", "quantization_config": {"weight_block_size": [128, 128]}}


@pytest.mark.parametrize(
    ("config", "linear", "experts", "output", "first"),
    [
        (V3, "deepseek_v3", "deepseek_v3", "deepseek_v3", False),
        (V32, "checkpoint,act_group=128,act_rounding=pow2_ceil,act_floor=0.0001", None, None, False),
        (V4, "deepseek_v4", "deepseek_v4", "weight_only", True),
        (V41, "deepseek_v4_1", "deepseek_v4_1", "weight_only", True),
        (QWEN, "checkpoint", "checkpoint", "checkpoint", False),
    ],
)
def test_reference_is_what_the_authors_run(config, linear, experts, output, first):
    policy = model_policy("reference", config)
    assert policy.linear == get_numerics(linear)
    assert policy.experts == get_numerics(experts or linear)
    assert policy.grouped_output == get_numerics(output or linear)
    assert policy.weigh_first is first


@pytest.mark.parametrize(("preset", "fp4"), [("hf", "fp8_1x32_ue8m0"), ("vllm", "fp8_1x128_ue8m0")])
def test_engines_use_fp32_scales_and_weigh_last(preset, fp4):
    policy = model_policy(preset, V4)
    assert policy.linear == policy.grouped_output == Numerics(act_group=128, act_rounding="none", mxfp4_act=fp4)
    assert not policy.weigh_first


def test_numerics_for_every_layer_keep_the_order_of_the_family():
    policy = model_policy("weight_only", V4)
    assert policy.linear == policy.experts == policy.grouped_output == get_numerics("weight_only")
    assert policy.weigh_first


def test_every_row_says_where_it_comes_from():
    rows = model_policy("reference", V4).rows()
    assert [field for field, _, _ in rows] == ["linear", "experts", "grouped_output", "routing weight"]
    assert all("DeepSeek-V4 inference code" in source for _, _, source in rows)
    usual = {field: source for field, _, source in model_policy("reference", QWEN).rows()}
    assert "block and scale rule" in usual["linear"]
    assert "weighed as it is summed" in usual["routing weight"]


def test_an_unknown_preset_is_refused_with_the_near_names():
    with pytest.raises(UnknownNameError, match="did you mean 'reference'"):
        model_policy("refrence", V4)
