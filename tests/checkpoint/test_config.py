"""`quantization_config` in its dialects."""

import pytest

from blockscale.checkpoint.config import parse_config, read_config
from blockscale.errors import CheckpointError


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq' is not block-scaled floats"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size needs two positive integers"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size needs two positive integers"),
        ({"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}, "quant_algo 'INT4_AWQ' is not known"),
        ({"quant_method": "compressed-tensors"}, "needs config_groups"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4, "group_size": 128}}},
            },
            "4-bit int with strategy None",
        ),
        ({"quant_method": "fp8", "modules_to_not_convert": [1]}, "skip list needs strings"),
        (["fp8"], "needs a JSON object"),
    ],
)
def test_configs_that_are_refused(raw, says):
    with pytest.raises(CheckpointError) as e:
        parse_config(raw, "config.json: quantization_config")
    assert says in str(e.value)
    assert "config.json" in str(e.value)


def test_both_skip_lists():
    for key in ("modules_to_not_convert", "ignored_layers"):
        assert parse_config({"quant_method": "fp8", key: ["lm_head"]}, "x").skip == ("lm_head",)


def test_mixed_modelopt_layers():
    raw = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": "FP8"}},
    }
    config = parse_config(raw, "x")
    assert [f.name for f in config.formats("a.q_proj")] == ["nvfp4"]
    assert [f.name for f in config.formats("b")] == ["fp8_tensor"]


def test_a_config_that_is_a_link_to_nothing_is_not_no_config(tmp_path):
    (tmp_path / "config.json").symlink_to("blob-that-was-not-downloaded")
    with pytest.raises(CheckpointError, match=r"config\.json: a link to nothing"):
        read_config(tmp_path)
