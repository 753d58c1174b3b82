"""The words on disk, spelled out."""

import pytest

from blockscale.checkpoint.names import (
    Parts,
    find_parts,
    get_style,
    is_official_v4,
    module_of,
    v4_to_transformers,
)
from blockscale.errors import UnknownNameError

V4 = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "layers.3.attn.wq_a.weight": "model.layers.3.self_attn.q_a_proj.weight",
    "layers.3.attn.wq_a.scale": "model.layers.3.self_attn.q_a_proj.weight_scale_inv",
    "layers.3.attn.q_norm.weight": "model.layers.3.self_attn.q_a_norm.weight",
    "layers.3.attn.kv_norm.weight": "model.layers.3.self_attn.kv_norm.weight",
    "layers.3.attn.wkv.weight": "model.layers.3.self_attn.kv_proj.weight",
    "layers.3.attn.wo_a.scale": "model.layers.3.self_attn.o_a_proj.weight_scale_inv",
    "layers.3.attn.attn_sink": "model.layers.3.self_attn.sinks",
    "layers.3.attn.compressor.ape": "model.layers.3.self_attn.compressor.position_bias",
    "layers.3.attn.compressor.norm.weight": "model.layers.3.self_attn.compressor.kv_norm.weight",
    "layers.3.attn.compressor.wgate.weight": "model.layers.3.self_attn.compressor.gate_proj.weight",
    "layers.3.attn.indexer.wq_b.weight": "model.layers.3.self_attn.compressor.indexer.q_b_proj.weight",
    "layers.3.attn.indexer.compressor.wkv.weight": "model.layers.3.self_attn.compressor.indexer.kv_proj.weight",
    "layers.3.attn.indexer.weights_proj.weight": (
        "model.layers.3.self_attn.compressor.indexer.scorer.weights_proj.weight"
    ),
    "layers.3.attn_norm.weight": "model.layers.3.input_layernorm.weight",
    "layers.3.hc_attn_scale": "model.layers.3.attn_hc.scale",
    "layers.3.hc_ffn_fn": "model.layers.3.ffn_hc.fn",
    "layers.3.ffn.gate.bias": "model.layers.3.mlp.gate.e_score_correction_bias",
    "layers.3.ffn.gate.tid2eid": "model.layers.3.mlp.gate.tid2eid",
    "layers.3.ffn.shared_experts.w2.scale": "model.layers.3.mlp.shared_experts.down_proj.weight_scale_inv",
    "layers.3.ffn.experts.7.w1.weight": "model.layers.3.mlp.experts.7.w1.weight",
    "mtp.0.ffn.experts.7.w1.weight": "mtp.0.ffn.experts.7.w1.weight",
}


@pytest.mark.parametrize(("official", "theirs"), V4.items())
def test_v4_names_become_those_of_transformers(official, theirs):
    assert v4_to_transformers(official) == theirs


def test_official_v4_is_recognised():
    assert is_official_v4(["embed.weight", "layers.0.attn.wq_a.weight"])
    assert not is_official_v4(["model.layers.0.self_attn.q_a_proj.weight"])


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["m.weight", "m.weight_scale_inv"], Parts("m.weight", "m.weight_scale_inv")),
        (["m.weight", "m.scale"], Parts("m.weight", "m.scale")),
        (
            ["m.weight", "m.weight_scale", "m.weight_scale_2", "m.input_scale"],
            Parts("m.weight", "m.weight_scale", "m.weight_scale_2", "m.input_scale"),
        ),
        (
            ["m.weight_packed", "m.weight_scale", "m.weight_global_scale", "m.input_global_scale"],
            Parts("m.weight_packed", "m.weight_scale", "m.weight_global_scale", "m.input_global_scale", inverse=True),
        ),
        (
            ["m.experts.gate_up_proj", "m.experts.gate_up_proj_scale_inv"],
            Parts("m.experts.gate_up_proj", "m.experts.gate_up_proj_scale_inv"),
        ),
        (["m.weight", "n.weight_scale_inv"], None),
    ],
)
def test_parts_are_found(names, parts):
    assert find_parts(names[0], names) == parts


def test_module_of():
    assert module_of("a.b.weight") == "a.b"
    assert module_of("a.b.weight_packed") == "a.b"
    assert module_of("a.b.bias") == "a.b.bias"


def test_unknown_style_names_the_near_one():
    with pytest.raises(UnknownNameError, match="did you mean 'deepseek'"):
        get_style("deepsek")
