"""Block-scaled checkpoints through transformers: as stored, on our modules, and back."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import blockscale
from blockscale import reference
from blockscale.checkpoint import dequantize_checkpoint, open_checkpoint, quantize_checkpoint
from blockscale.errors import CheckpointError
from blockscale.integrations import transformers as integration
from blockscale.integrations.transformers import filling, measure
from blockscale.integrations.transformers.binding import Slot
from blockscale.nn import BlockDiagonalLinear
from makers import make_deepseek_v4, make_qwen3_moe

IDS = torch.arange(3, 20)[None]


def tensors_of(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same_bytes(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def dequantized_model(folder):
    """Stock transformers in fp32 with the dequantized weights: an independent weight-only implementation."""
    checkpoint = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "bf16", dtype=torch.float32)
    for layer in checkpoint.layers:
        model.get_submodule(layer.name).weight.data = reference.dequantize(checkpoint.load(layer.name))
    return model


def fake_quantize(module, args):
    return (reference.dequantize(reference.quantize(args[0], blockscale.get_format("fp8_1x128"))),)


def test_ragged_layers_load_as_stored(ragged):
    model = integration.load(ragged, dtype=torch.float32)
    stored = tensors_of(ragged)
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, blockscale.nn.Linear)
    assert (layer.out_features, layer.in_features) == (192, 256)
    assert same_bytes(layer.weight, stored["model.layers.1.mlp.up_proj.weight"])
    assert same_bytes(layer.weight_scale_inv, stored["model.layers.1.mlp.up_proj.weight_scale_inv"])
    assert sum(isinstance(m, blockscale.nn.Linear) for m in model.modules()) == 14
    assert type(model.lm_head) is blockscale.nn.DenseLinear
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_whole_model_equals_dequantized_weights_in_stock_transformers(ragged):
    model, plain = integration.load(ragged, dtype=torch.float32, numerics="weight_only"), dequantized_model(ragged)
    with torch.no_grad():
        got, want = model(IDS).logits, plain(IDS).logits
    assert (got - want).norm() / want.norm() < 1e-5


def test_activations_are_quantized_as_the_checkpoint_asks(ragged):
    model, plain = integration.load(ragged, dtype=torch.float32), dequantized_model(ragged)
    for layer in open_checkpoint(ragged).layers:
        plain.get_submodule(layer.name).register_forward_pre_hook(fake_quantize)
    with torch.no_grad():
        got, want = model(IDS).logits, plain(IDS).logits
    assert (got - want).norm() / want.norm() < 1e-3


def test_casting_the_model_leaves_the_bytes_alone(ragged):
    model, stored = integration.load(ragged, dtype=torch.bfloat16), tensors_of(ragged)
    for cast in (torch.float32, torch.float16, torch.bfloat16):
        model.to(cast)
        layer = model.model.layers[0].self_attn.k_proj
        assert model.lm_head.weight.dtype == cast
        assert same_bytes(layer.weight, stored["model.layers.0.self_attn.k_proj.weight"])
        assert same_bytes(layer.weight_scale_inv, stored["model.layers.0.self_attn.k_proj.weight_scale_inv"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_save_pretrained_round_trips_every_byte(ragged, tmp_path, dtype):
    integration.load(ragged, dtype=dtype).save_pretrained(tmp_path)
    before, after = tensors_of(ragged), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert [name for name in before if not same_bytes(before[name], after[name])] == []
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ragged, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_tensors_decide_and_not_the_skip_list(copy):
    folder = copy(config=lambda c: c.update(modules_to_not_convert=["model.layers.0.mlp.down_proj"]))
    model = integration.load(folder)
    assert isinstance(model.model.layers[0].mlp.down_proj, blockscale.nn.Linear)


def test_a_missing_scale_is_refused(copy):
    folder = copy(lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj.*has no scale"):
        integration.load(folder)


def test_a_scale_without_a_weight_is_refused(copy):
    folder = copy(lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj.*without"):
        integration.load(folder)


def test_a_block_size_that_disagrees_is_refused(copy):
    folder = copy(config=lambda c: c.update(weight_block_size=[64, 64]))
    with pytest.raises(CheckpointError, match="disagree"):
        integration.load(folder)


def test_a_nan_scale_is_refused(copy):
    def poison(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight_scale_inv"][0, 0] = float("nan")

    with pytest.raises(CheckpointError, match=r"q_proj.*must be finite"):
        integration.load(copy(poison))


def test_a_weight_of_another_shape_than_the_model_is_refused(copy):
    def crop(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name][:130].contiguous()

    with pytest.raises(CheckpointError, match=r"stored \[130, 256\], the model's .* needs \[192, 256\]"):
        integration.load(copy(crop))


def test_a_plain_checkpoint_is_refused(ragged):
    with pytest.raises(CheckpointError, match="no block-scaled weights"):
        integration.load(ragged.parent / "bf16")


def test_an_ordered_kernel_serves_every_layer(ragged):
    model = integration.load(ragged, kernel="reference")
    assert measure.kernels_in_use(model)["reference.linear"] == 14


def test_generation_is_measured(ragged):
    model, seen = integration.load(ragged), []
    with measure.time_split(model) as split:
        timing = measure.generate(model, IDS, 5, stop=False, on_token=seen.append)
    assert timing.prompt_tokens == 17
    assert seen == list(timing.tokens)
    assert len(seen) == 5
    assert split.calls == {"ours": 14 * 5, "dense": 5}
    assert split.ours + split.dense + split.rest == pytest.approx(split.total)


def test_weight_bytes_counts_shared_storage_once(ragged):
    model = integration.load(ragged, dtype=torch.bfloat16)
    stored = sum(t.nbytes for t in tensors_of(ragged).values())
    rotary = 2 * 32 * 4  # inverse frequencies, which no checkpoint holds
    assert stored <= measure.weight_bytes(model) <= stored + rotary


@pytest.mark.parametrize("fmt", ["fp8_row", "fp8_128x128_ue8m0", "mxfp8", "mxfp4", "nvfp4"])
def test_every_format_that_quantize_writes_loads_and_saves_back(ragged, tmp_path, fmt):
    quantize_checkpoint(ragged.parent / "bf16", tmp_path / "stored", fmt)
    model = integration.load(tmp_path / "stored", dtype=torch.float32, numerics="weight_only")
    layer = model.model.layers[0].mlp.up_proj
    stored = open_checkpoint(tmp_path / "stored").load("model.layers.0.mlp.up_proj")
    assert layer.format.name == fmt
    x = torch.randn(3, 256)
    torch.testing.assert_close(layer(x), x @ reference.dequantize(stored).T, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(tmp_path / "stored"), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert [name for name in before if not same_bytes(before[name], after[name])] == []


@pytest.mark.parametrize("fmt", ["fp8_tensor", "fp8_row", "mxfp4", "nvfp4"])
def test_a_grouped_projection_keeps_every_level_of_its_scales(tmp_path, fmt):
    """Stored as one matrix, held as one for each group: a tensor's one scale, NVFP4's second level are all groups'."""
    make_deepseek_v4(tmp_path / "v4", hash_layers=0, mtp=False)
    dequantize_checkpoint(tmp_path / "v4", tmp_path / "bf16")
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "stored", fmt, only=("*.wo_a",))
    model = integration.load(tmp_path / "stored", dtype=torch.float32, numerics="weight_only")
    layers = [m for m in model.modules() if isinstance(m, BlockDiagonalLinear)]
    assert [layer.format.name for layer in layers] == [fmt] * 4
    x = torch.randn(3, 2, 256)
    for i, layer in enumerate(layers):
        weight = reference.dequantize(open_checkpoint(tmp_path / "stored").load(f"layers.{i}.attn.wo_a"))
        want = torch.einsum("tgk,gnk->tgn", x, weight.view(2, 128, 256))
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(tmp_path / "stored"), tensors_of(tmp_path / "saved")
    assert [name for name in before if not same_bytes(before[name], after[name])] == []


@pytest.mark.parametrize("fmt", ["fp8_tensor", "fp8_row", "nvfp4"])
def test_a_grouped_projection_copied_to_a_device_is_the_same(fmt):
    """A CPU takes the bytes where they lie; elsewhere they are copied into the module's own."""
    stored = blockscale.quantize(torch.randn(8, 32), fmt)
    empty = blockscale.quantize(torch.ones(2, 4, 32), fmt)
    filling._copy(filling._shaped(stored, empty), empty, Slot(None))
    assert torch.equal(reference.dequantize(empty), reference.dequantize(stored).view(2, 4, 32))


HERE = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_device_map_places_layers_and_offloads_the_rest(ragged, tmp_path, offload_buffers):
    """Block-scaled weights are buffers: accelerate leaves them on the device unless it offloads buffers too."""
    options = {"device_map": HERE | {"model.layers.1": "disk"}, "offload_folder": tmp_path / "offload"}
    want = integration.load(ragged)
    model = integration.load(ragged, offload_buffers=offload_buffers, **options)
    layer = model.model.layers[1].mlp.up_proj
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, want(IDS).logits)
        assert layer.weight.is_meta == offload_buffers
    assert sum(measure.kernels_in_use(model).values()) >= 14
    with pytest.warns(UserWarning, match="offloaded modules"):  # transformers' own, about memory
        model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(ragged), tensors_of(tmp_path / "saved")
    assert [name for name in before if not same_bytes(before[name], after[name])] == []


def test_offloaded_experts_are_stacked_and_saved_back(tmp_path):
    make_qwen3_moe(tmp_path / "stored", intermediate=192)
    options = {"device_map": HERE | {"model.layers.1": "disk"}, "offload_folder": tmp_path / "offload"}
    model = integration.load(tmp_path / "stored", offload_buffers=True, **options)
    assert model.model.layers[1].mlp.experts.down.quantized.data.is_meta
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, integration.load(tmp_path / "stored")(IDS).logits)
    with pytest.warns(UserWarning, match="offloaded modules"):  # transformers' own, about memory
        model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(tmp_path / "stored"), tensors_of(tmp_path / "saved")
    assert [name for name in before if not same_bytes(before[name], after[name])] == []
