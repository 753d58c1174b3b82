"""What is stored is decided from the headers; a config that says otherwise is an error that shows both."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale import get_format, reference
from blockscale.checkpoint import convert_checkpoint, dequantize_checkpoint, open_checkpoint
from blockscale.errors import CheckpointError

BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
UE8M0 = BLOCK | {"scale_fmt": "ue8m0"}
FP8 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu


def write(path, tensors, quantization=None, **config):
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    config |= {"quantization_config": quantization} if quantization else {}
    (path / "config.json").write_text(json.dumps(config))
    return path


def layer(tmp_path, data, scale, quantization, name="weight_scale_inv", **more):
    tensors = {"m.weight": data, f"m.{name}": scale} | {f"m.{n}": t for n, t in more.items()}
    return open_checkpoint(write(tmp_path / "c", tensors, quantization)).layers[0]


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("v3", {("fp8_128x128", "F32"): 40}),
        ("v31", {("fp8_128x128_ue8m0", "F32"): 40}),
        ("v32", {("fp8_128x128_ue8m0", "F32"): 78}),
        ("v4", {("fp8_128x128_ue8m0", "F8_E8M0"): 34, ("mxfp4", "F8_E8M0"): 96}),
        ("v4_base", {("fp8_128x128_ue8m0", "F32"): 140}),
        (
            "v4_nvfp4",
            {("fp8_128x128_ue8m0", "F8_E8M0"): 44, ("mxfp4", "F8_E8M0"): 24, ("nvfp4", "F8_E4M3"): 96},
        ),
        ("v41", {("fp8_32x32_ue8m0", "F8_E8M0"): 34, ("mxfp4", "F8_E8M0"): 96}),
        ("qwen3", {("fp8_128x128", "BF16"): 56}),
        ("minimax", {("fp8_128x128", "F32"): 56}),
    ],
)
def test_every_model_is_read_as_stored(models, name, formats):
    checkpoint = open_checkpoint(models(name))
    found = {}
    for stored in checkpoint.layers:
        key = (stored.format.name, stored.scale_dtype)
        found[key] = found.get(key, 0) + 1
    assert found == formats
    for stored in checkpoint.layers[:: len(checkpoint.layers) // 8]:
        q = checkpoint.load(stored.name)
        raw = load_file(stored.file)[stored.parts.data]
        assert q.shape == stored.shape
        assert torch.equal(q.data.view(torch.uint8), raw.view(torch.uint8))


def test_ragged_layers_are_marked(models):
    checkpoint = open_checkpoint(models("v3"))
    kv = checkpoint.layer("model.layers.0.self_attn.kv_a_proj_with_mqa")
    assert (kv.shape, kv.ragged) == ((576, 256), True)
    assert not checkpoint.layer("model.layers.0.self_attn.o_proj.weight").ragged
    assert checkpoint.layer("model.norm") is None


@pytest.mark.parametrize(
    ("data", "scale", "name", "quantization", "more", "fmt"),
    [
        ((4, 8), torch.ones(()), "weight_scale", None, {}, "fp8_tensor"),
        ((4, 8), torch.ones(4, 1), "weight_scale", None, {}, "fp8_row"),
        ((4, 8), torch.ones(4), "weight_scale", None, {}, "fp8_row"),
        ((4, 64), torch.ones(4, 2, dtype=torch.uint8) * 127, "weight_scale", None, {}, "mxfp8"),
        (
            (200, 300),
            torch.ones(2, 1, 3, 1),
            "weight_scale",
            {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
            {},
            "fp8_128x128",
        ),
        (
            (4, 8),
            torch.ones(4, 1, dtype=torch.bfloat16),
            "weight_scale",
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
            },
            {},
            "fp8_row",
        ),
        ((4, 8), torch.ones(1, 1), "weight_scale_inv", BLOCK, {"input_scale": torch.ones(())}, "fp8_128x128"),
    ],
    ids=["tensor", "row", "row-1d", "mxfp8", "pb_wo", "channel", "static"],
)
def test_other_dialects(tmp_path, data, scale, name, quantization, more, fmt):
    stored = layer(tmp_path, torch.ones(data).to(FP8), scale, quantization, name, **more)
    assert stored.format.name == fmt
    q = open_checkpoint(tmp_path / "c").load("m")
    assert q.scale.shape == stored.format.scale_shape(*data)
    assert (q.input_scale is not None) == bool(more)


def test_inverse_global_scales_of_compressed_tensors(tmp_path):
    tensors = {
        "m.weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
        "m.weight_scale": torch.ones(4, 2).to(FP8),
        "m.weight_global_scale": torch.tensor([4.0]),
        "m.input_global_scale": torch.tensor([8.0]),
    }
    q = open_checkpoint(write(tmp_path / "c", tensors)).load("m")
    assert (q.format.name, q.shape, float(q.global_scale), float(q.input_scale)) == ("nvfp4", (4, 32), 0.25, 0.125)


def test_stacked_experts(tmp_path):
    tensors = {
        "e.gate_up_proj": torch.ones(3, 200, 128).to(FP8),
        "e.gate_up_proj_scale_inv": torch.ones(3, 2, 1),
    }
    stored = open_checkpoint(write(tmp_path / "c", tensors, BLOCK)).layers[0]
    assert (stored.name, stored.shape, stored.format.name) == ("e.gate_up_proj", (3, 200, 128), "fp8_128x128")


@pytest.mark.parametrize(
    ("tensors", "quantization", "config", "says"),
    [
        ({"m.weight": torch.ones(4, 8).to(FP8)}, BLOCK, {}, "m.weight F8_E4M3 [4, 8]: has no scale, needs m.weight_sc"),
        (
            {"m.weight": torch.ones(200, 256).to(FP8), "m.weight_scale_inv": torch.ones(1, 2)},
            BLOCK,
            {},
            "fp8_128x128 needs scale [2, 2]; config and tensors disagree",
        ),
        (
            {"m.weight": torch.ones(256, 256).to(FP8), "m.weight_scale_inv": torch.ones(2, 2)},
            BLOCK | {"weight_block_size": [64, 64]},
            {},
            "m.weight_scale_inv F32 [2, 2]: fp8_64x64 needs scale [4, 4]; config and tensors disagree",
        ),
        (
            {"m.weight": torch.ones(256, 256).to(FP8), "m.weight_scale_inv": torch.ones(2, 2)},
            None,
            {},
            "cannot tell the block size of m.weight_scale_inv F32 [2, 2]: no quantization_config",
        ),
        ({"m.weight": torch.ones(4, 8), "m.weight_scale_inv": torch.ones(1, 1)}, BLOCK, {}, "is not quantized, yet"),
        ({"m.weight_scale_inv": torch.ones(1, 1)}, BLOCK, {}, "a scale without its weight (m.weight)"),
        (
            {"m.weight": torch.ones(4, 64, dtype=torch.int8), "m.scale": torch.ones(4, 4).to(E8M0)},
            UE8M0,
            {"expert_dtype": "fp8"},
            "stored is mxfp4, the config allows fp8_128x128",
        ),
        (
            {"m.weight": torch.ones(4, 64, dtype=torch.int8), "m.scale": torch.ones(4, 3).to(E8M0)},
            UE8M0,
            {},
            "mxfp4 of [4, 128] needs scale [4, 4], got m.scale F8_E8M0 [4, 3]",
        ),
        (
            {"m.weight": torch.ones(4, 64, dtype=torch.uint8), "m.weight_scale": torch.ones(4, 8).to(FP8)},
            None,
            {},
            "nvfp4 needs a global scale",
        ),
        (
            {"m.weight": torch.ones(4, 8).to(torch.float8_e5m2), "m.weight_scale_inv": torch.ones(1, 1)},
            BLOCK,
            {},
            "data is fp8e5m2, the config allows fp8_128x128",
        ),
    ],
)
def test_contradictions(tmp_path, tensors, quantization, config, says):
    path = write(tmp_path / "c", tensors, quantization, **config)
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(path)
    assert says in str(e.value)
    assert "model.safetensors" in str(e.value)


@pytest.mark.parametrize(
    ("scale", "quantization", "says"),
    [
        (torch.full((1, 1), torch.nan), BLOCK, "m.weight_scale_inv: scales must be finite and not negative, got nan"),
        (torch.full((1, 1), torch.inf), BLOCK, "got inf at [0, 0]"),
        (torch.full((1, 1), -1.0), BLOCK, "got -1 at [0, 0]"),
        (torch.full((1, 1), 255, dtype=torch.uint8).view(E8M0), UE8M0, "got nan"),
        (torch.full((1, 1), 0.3), UE8M0, "needs powers of two, got 0.3 at [0, 0]"),
    ],
)
def test_bad_scales_fail_when_loaded(tmp_path, scale, quantization, says):
    path = write(tmp_path / "c", {"m.weight": torch.ones(4, 8).to(FP8), "m.weight_scale_inv": scale}, quantization)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError) as e:
        checkpoint.load("m")
    assert says in str(e.value)


def test_e8m0_ends_are_exact(tmp_path):
    scale = torch.tensor([[0, 254]], dtype=torch.uint8).view(E8M0)
    path = write(tmp_path / "c", {"m.weight": torch.ones(4, 256).to(FP8), "m.scale": scale}, UE8M0)
    q = open_checkpoint(path).load("m.weight")
    assert q.scale.view(torch.uint8).tolist() == [[0, 254]]


def gpt_oss(path):
    """Two experts' MXFP4 as gpt-oss stores it: `[E, N, K / 32, 16]` bytes and `[E, N, K / 32]` E8M0 bytes."""
    path.mkdir()
    q = reference.quantize(torch.randn(2, 48, 96), get_format("mxfp4"))
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": q.data.reshape(2, 48, 3, 16),
        "model.layers.0.mlp.experts.gate_up_proj_scales": q.scale.view(torch.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_bias": torch.randn(2, 48).bfloat16(),
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "gpt_oss",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]},
    }
    (path / "config.json").write_text(json.dumps(config))
    return q


def test_gpt_oss_blocks(tmp_path):
    q = gpt_oss(tmp_path / "src")
    checkpoint = open_checkpoint(tmp_path / "src")
    (layer,) = checkpoint.layers
    assert layer.name == "model.layers.0.mlp.experts.gate_up_proj"
    assert (layer.format.name, layer.shape) == ("mxfp4", (2, 48, 96))
    loaded = checkpoint.load(layer.name)
    assert torch.equal(reference.dequantize(loaded), reference.dequantize(q))
    convert_checkpoint(tmp_path / "src", tmp_path / "there", style="compressed_tensors")
    assert open_checkpoint(tmp_path / "there").layers[0].parts.data == "model.layers.0.mlp.experts.gate_up_proj"
    convert_checkpoint(tmp_path / "there", tmp_path / "back", style="gpt_oss")
    before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("src", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(CheckpointError, match="plain experts transposed"):
        dequantize_checkpoint(tmp_path / "src", tmp_path / "bf16")
    with pytest.raises(CheckpointError, match="style gpt_oss cannot describe fp8_128x128"):
        convert_checkpoint(tmp_path / "src", tmp_path / "x", "fp8_128x128", style="gpt_oss")
