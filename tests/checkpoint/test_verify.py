"""Comparing checkpoints: every kind of difference is seen, and named."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from blockscale.checkpoint import compare_checkpoints


@pytest.fixture
def copy(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "copy")
    return tmp_path / "copy"


def edit(path, change):
    shard = path / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


NAME = "model.layers.0.self_attn.q_proj.weight"


def test_a_copy_is_identical(llama, copy):
    report = compare_checkpoints(llama, copy)
    assert (report["identical"], report["same_values"], report["max_relative_error"]) == (True, True, 0.0)
    assert len(report["tensors"]) == 12


def test_one_changed_element_is_seen(llama, copy):
    edit(copy, lambda t: t[NAME].view(-1)[77].add_(1.0))
    report = compare_checkpoints(llama, copy)
    changed = [row for row in report["tensors"] if not row["equal_bytes"]]
    assert [row["name"] for row in changed] == [NAME]
    assert changed[0]["max_error"] == pytest.approx(1.0, abs=0.01)
    assert not report["same_values"]


def test_nan_on_one_side_is_an_infinite_error(llama, copy):
    edit(copy, lambda t: t[NAME].view(-1)[5].fill_(float("nan")))
    report = compare_checkpoints(llama, copy)
    assert report["max_relative_error"] == float("inf")


def test_structure(llama, copy):
    edit(copy, lambda t: t.update({NAME: t[NAME][:128].clone()}))
    assert compare_checkpoints(llama, copy)["structure"] == [f"{NAME}: [256, 256] against [128, 256]"]
    index = copy / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    del said["weight_map"][NAME]
    index.write_text(json.dumps(said))
    edit(copy, lambda t: t.pop(NAME))
    assert compare_checkpoints(llama, copy)["structure"] == [f"only in {llama}: {NAME}"]


def test_config_differences(llama, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    report = compare_checkpoints(llama, copy)
    assert report["config"] == [["config.rms_norm_eps", 1e-06, 1e-05]]
    assert (report["identical"], report["same_values"]) == (False, True)


def test_config_differences_of_a_composite_model(llama, copy, tmp_path):
    """The language model's part lies one level down, there is none to compare, or it is no object at all."""
    config = json.loads((llama / "config.json").read_text())
    whole = shutil.copytree(llama, tmp_path / "whole")

    def differences(one, two):
        for path, nested in ((whole, one), (copy, two)):
            (path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": nested}))
        report = compare_checkpoints(whole, copy)
        assert report["same_values"]
        assert report["identical"] == (not report["config"])
        return report["config"]

    assert differences(config, config) == []
    assert differences(config, config | {"rms_norm_eps": 1e-5}) == [["config.text_config.rms_norm_eps", 1e-06, 1e-05]]
    quiet = {"dtype": "float32", "transformers_version": "0", "expert_dtype": "fp4"}
    assert differences(config, config | quiet) == []
    assert differences({"hidden_size": 8}, None) == [["config.text_config.hidden_size", 8, None]]
    assert differences({"hidden_size": 8}, 3) == [
        ["config.text_config", None, 3],
        ["config.text_config.hidden_size", 8, None],
    ]
