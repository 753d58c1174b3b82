"""Folders that do not hold the model which their config.json describes are refused: nothing is made up or dropped."""

import json

import pytest

from blockscale.errors import CheckpointError
from blockscale.integrations import transformers as integration
from makers import make_qwen3_moe


def described(folder, **changes):
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_layers_that_the_file_lacks_are_not_made_up(copy):
    with pytest.raises(CheckpointError, match=r"also needs model\.layers\.2\.input_layernorm\.weight.* and \d+ more"):
        integration.load(described(copy(), num_hidden_layers=3))


def test_a_norm_that_the_file_lacks_is_not_made_up(copy):
    folder = copy(lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"also needs model\.norm\.weight$"):
        integration.load(folder)


def test_experts_that_the_model_lacks_are_not_dropped(tmp_path):
    folder = described(make_qwen3_moe(tmp_path / "moe"), num_experts=2)
    with pytest.raises(CheckpointError, match=r"gate weights of experts \[2, 3.*\], the model 2 experts"):
        integration.load(folder)


def test_plain_tensors_of_another_shape_are_refused(copy):
    folder = described(copy(), vocab_size=77)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight \[300, 256\] where the model needs \[77, 256\]"):
        integration.load(folder)
    model, info = integration.load(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert model.model.embed_tokens.weight.shape == (77, 256)
    assert info["mismatched_keys"]


@pytest.mark.parametrize("kind", ["foo", "vit", None])
def test_a_model_that_transformers_does_not_know_is_said_in_a_line(copy, kind):
    with pytest.raises(CheckpointError, match=r"config\.json: (transformers cannot read it|no causal language model)"):
        integration.load(described(copy(), model_type=kind, architectures=None))


def test_shards_that_transformers_would_not_find(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"needs model\.safetensors\.index\.json or one model\.safetensors"):
        integration.load(folder)
    with pytest.raises(CheckpointError, match="needs a folder"):
        integration.load(folder / "weights.safetensors")
