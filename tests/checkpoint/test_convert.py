"""Conversions: exact ones change no value and go back byte for byte; the others are refused, or reported."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale import get_format, reference
from blockscale.checkpoint import (
    compare_checkpoints,
    convert_checkpoint,
    dequantize_checkpoint,
    open_checkpoint,
    quantize_checkpoint,
)
from blockscale.checkpoint.errors import DestinationError, InexactError
from blockscale.checkpoint.exact import values
from blockscale.errors import CheckpointError


def tensors_of(path):
    return {n: t for shard in sorted(path.glob("*.safetensors")) for n, t in load_file(shard).items()}


@pytest.mark.parametrize(
    ("name", "there", "back"),
    [
        ("v31", {"scale_dtype": "e8m0"}, {"scale_dtype": "f32"}),
        ("v31", {"style": "deepseek_v4", "scale_dtype": "e8m0"}, {"style": "deepseek", "scale_dtype": "f32"}),
        ("v4", {"scale_dtype": "f32"}, {"scale_dtype": "e8m0"}),
        ("qwen3", {"style": "compressed_tensors"}, {"style": "deepseek", "scale_dtype": "bf16"}),
        ("minimax", {"style": "modelopt"}, {"style": "deepseek"}),
    ],
)
def test_exact_there_and_back_is_byte_identical(models, tmp_path, name, there, back):
    src = models(name)
    result = convert_checkpoint(src, tmp_path / "there", **there)
    assert all(record["exact"] for record in result.records if record["step"] == "convert")
    assert compare_checkpoints(src, tmp_path / "there")["same_values"]
    convert_checkpoint(tmp_path / "there", tmp_path / "back", **back)
    report = compare_checkpoints(src, tmp_path / "back")
    assert report["structure"] == []
    assert all(row["equal_bytes"] for row in report["tensors"])
    one, two = tensors_of(src), tensors_of(tmp_path / "back")
    assert one.keys() == two.keys()
    assert all(
        torch.equal(t.reshape(-1).view(torch.uint8), two[n].reshape(-1).view(torch.uint8)) for n, t in one.items()
    )


@pytest.mark.parametrize(
    ("name", "fmt", "stored"),
    [
        ("v4", "fp8_128x128_ue8m0", {("fp8_128x128_ue8m0", "F8_E8M0")}),  # MXFP4 in FP8 tiles: V4-Base
        pytest.param("v4", "mxfp8", {("mxfp8", "F8_E8M0")}, marks=pytest.mark.slow),
        ("v3", "fp8_1x128", {("fp8_1x128", "F32")}),
        pytest.param("v41", "mxfp8", {("mxfp8", "F8_E8M0")}, marks=pytest.mark.slow),
    ],
)
def test_formats_that_hold_the_same_values(models, tmp_path, name, fmt, stored):
    convert_checkpoint(models(name), tmp_path / "out", fmt)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {(layer.format.name, layer.scale_dtype) for layer in checkpoint.layers} == stored
    assert compare_checkpoints(models(name), tmp_path / "out")["same_values"]
    assert "expert_dtype" not in checkpoint.config


@pytest.mark.parametrize("globs", [{"only": ("nothing*",)}, {"skip": ("*",)}])
def test_globs_that_leave_nothing_to_do_are_an_error(models, tmp_path, globs):
    with pytest.raises(CheckpointError, match=r"no layer to convert: \d+ are block-scaled, --(only nothing|skip )\*"):
        convert_checkpoint(models("v3"), tmp_path / "out", "mxfp8", **globs)
    assert list(tmp_path.iterdir()) == []


def test_inexact_is_refused_and_leaves_nothing(models, tmp_path):
    with pytest.raises(InexactError) as e:
        convert_checkpoint(models("v3"), tmp_path / "out", "fp8_128x128_ue8m0")
    assert "model-00001-of-00002.safetensors: model.layers.0.mlp.down_proj: fp8_128x128 (F32 scales) to" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_requantize_reports_its_error(models, tmp_path):
    result = convert_checkpoint(models("v3"), tmp_path / "out", "fp8_128x128_ue8m0", requantize=True, report="full")
    old, new = open_checkpoint(models("v3")), open_checkpoint(tmp_path / "out")
    for record in result.records[:12]:
        if record["step"] == "convert":
            before = values(old.load(record["name"]))
            after = values(new.load(record["name"]))
            error = float((before - after).norm() / before.norm())
            assert record["relative_error"] == pytest.approx(error, rel=1e-4)
            assert not record["exact"]
            want = reference.quantize(before.float(), get_format("fp8_128x128_ue8m0"))
            assert torch.equal(new.load(record["name"]).data.view(torch.uint8), want.data.view(torch.uint8))


@pytest.mark.parametrize(
    "fmt", ["nvfp4", "fp8_tensor", *(pytest.param(f, marks=pytest.mark.slow) for f in ("fp8_row", "mxfp4"))]
)
def test_requantize_to_every_kind(models, tmp_path, fmt):
    convert_checkpoint(models("minimax"), tmp_path / "out", fmt, requantize=True, only=(), skip=())
    checkpoint = open_checkpoint(tmp_path / "out")
    name = "model.layers.0.self_attn.o_proj"
    before = values(open_checkpoint(models("minimax")).load(name)).float()
    want = reference.quantize(before, get_format(fmt))
    q = checkpoint.load(name)
    assert checkpoint.layer(name).format.name == fmt
    assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
    assert q.global_scale is None or torch.equal(q.global_scale, want.global_scale)


def test_a_refused_run_can_go_on_with_the_refusal_lifted(tmp_path):
    """The first shard is exact, the second is not: allowing it keeps the first."""
    src = tmp_path / "src"
    src.mkdir()
    for i, scale in enumerate((2.0, 3.0)):
        data = torch.ones(128, 128).to(torch.float8_e4m3fn)
        parts = {f"l{i}.weight": data, f"l{i}.weight_scale_inv": torch.full((1, 1), scale)}
        save_file(parts, src / f"model-{i + 1:05d}-of-00002.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(InexactError, match="l1: fp8_128x128"):
        convert_checkpoint(src, tmp_path / "out", "fp8_128x128_ue8m0")
    with pytest.raises(DestinationError, match="format=mxfp8"):
        convert_checkpoint(src, tmp_path / "out", "mxfp8")
    result = convert_checkpoint(src, tmp_path / "out", "fp8_128x128_ue8m0", requantize=True)
    assert (result.kept, result.shards) == (1, 2)


def test_nvfp4_between_modelopt_and_compressed_tensors(llama, tmp_path):
    """The inverse of a compressed-tensors scale is exact both ways, since it was chosen so."""
    quantize_checkpoint(llama, tmp_path / "ct", "nvfp4", style="compressed_tensors")
    convert_checkpoint(tmp_path / "ct", tmp_path / "mo", style="modelopt")
    convert_checkpoint(tmp_path / "mo", tmp_path / "back", style="compressed_tensors")
    one, two = open_checkpoint(tmp_path / "ct"), open_checkpoint(tmp_path / "mo")
    for layer in one.layers:
        assert torch.equal(one.load(layer.name).global_scale, two.load(layer.name).global_scale)
    assert compare_checkpoints(tmp_path / "ct", tmp_path / "mo")["same_values"]
    assert compare_checkpoints(tmp_path / "ct", tmp_path / "back")["same_values"]


def test_a_mixture_no_config_can_describe(models, tmp_path):
    with pytest.raises(CheckpointError, match="no config can describe this mixture: fp8_128x128 as deepseek, fp8_row"):
        convert_checkpoint(models("v3"), tmp_path / "out", "fp8_row", only=("*self_attn*",), requantize=True)


def test_dequantize_of_powers_of_two_is_exact(models, tmp_path):
    result = dequantize_checkpoint(models("v4"), tmp_path / "out", "bf16")
    assert all(record["exact"] for record in result.records if record["step"] == "dequantize")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.layers == []
    assert "quantization_config" not in checkpoint.config
    assert compare_checkpoints(models("v4"), tmp_path / "out")["same_values"]


def test_dequantize_of_fp32_scales_says_what_it_costs(models, tmp_path):
    result = dequantize_checkpoint(models("v3"), tmp_path / "out")
    errors = [record["relative_error"] for record in result.records if record["step"] == "dequantize"]
    assert 5e-4 < max(errors) < 3e-3


@pytest.mark.parametrize(("top", "dtype"), [(torch.nan, "bf16"), (70_000.0, "f16")])
def test_dequantize_keeps_nan_and_refuses_what_the_dtype_cannot_hold(tmp_path, top, dtype):
    (tmp_path / "src").mkdir()
    weight = torch.ones(32, 32)
    weight[3, 5] = top
    save_file({"a.weight": weight}, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text("{}")
    quantize_checkpoint(tmp_path / "src", tmp_path / "q", "fp8_32x32_ue8m0", nan="keep")
    if dtype == "f16":
        message = r"q/model.safetensors: a: 73728 at \[3, 5\] is too large for F16; needs .* bf16 or f32"
        with pytest.raises(InexactError, match=message):
            dequantize_checkpoint(tmp_path / "q", tmp_path / "back", dtype)
        return
    (record,) = dequantize_checkpoint(tmp_path / "q", tmp_path / "back", dtype).records
    assert (record["exact"], record["relative_error"]) == (True, 0.0)
    back = open_checkpoint(tmp_path / "back").load("a.weight")
    assert back.isnan().nonzero().tolist() == [[3, 5]]
    assert "NaN" not in (tmp_path / "back" / "quantization_report.json").read_text()


def test_quantize_of_the_dequantized_gives_the_same_bytes_again(models, tmp_path):
    """FP32 scales survive: amax / 448 of the dequantized block is the scale it was made with, to the last bit or so."""
    dequantize_checkpoint(models("v31"), tmp_path / "f32", "f32")
    quantize_checkpoint(tmp_path / "f32", tmp_path / "again", "fp8_128x128_ue8m0", skip=("*eh_proj",))
    report = compare_checkpoints(models("v31"), tmp_path / "again")
    assert report["same_values"]


def test_static_input_scales_keep_their_name_and_value(tmp_path):
    """FP8 with a static activation scale is stored alike in both dialects, and nothing is inverted."""
    src = tmp_path / "src"
    src.mkdir()
    w = reference.quantize(torch.randn(64, 48), get_format("fp8_tensor"))
    tensors = {
        "a.weight": w.data,
        "a.weight_scale": w.scale.reshape(()),
        "a.input_scale": torch.tensor(0.3),
        "a.k_scale": torch.tensor(1.5),
    }
    save_file(tensors, src / "model.safetensors")
    (src / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": []}})
    )
    (src / "config.json").write_text(json.dumps({"model_type": "llama"}))
    convert_checkpoint(src, tmp_path / "ct", style="compressed_tensors")
    found = tensors_of(tmp_path / "ct")
    assert sorted(found) == ["a.input_scale", "a.k_scale", "a.weight", "a.weight_scale"]
    assert found["a.input_scale"] == torch.tensor(0.3)
    assert not (tmp_path / "ct" / "hf_quant_config.json").exists()
    assert open_checkpoint(tmp_path / "ct").load("a").input_scale == torch.tensor(0.3)
    convert_checkpoint(tmp_path / "ct", tmp_path / "back", style="modelopt")
    assert compare_checkpoints(src, tmp_path / "back")["same_values"]
    assert {n: t.reshape(-1).tolist() for n, t in tensors_of(tmp_path / "back").items() if n != "a.weight"} == {
        n: t.reshape(-1).tolist() for n, t in tensors.items() if n != "a.weight"
    }


def test_modelopts_own_config_file_stays_with_its_checkpoint(tmp_path):
    """Only the scales' dtype changes: config files are copied as they are."""
    src = tmp_path / "src"
    src.mkdir()
    w = reference.quantize(torch.randn(64, 64), get_format("mxfp8"))
    save_file({"a.weight": w.data, "a.weight_scale": w.scale.view(torch.uint8)}, src / "model.safetensors")
    text = json.dumps({"quantization": {"quant_algo": "MXFP8"}})
    (src / "hf_quant_config.json").write_text(text)
    (src / "config.json").write_text('{"model_type":   "llama"}')
    convert_checkpoint(src, tmp_path / "out", scale_dtype="e8m0")
    assert (tmp_path / "out" / "hf_quant_config.json").read_text() == text
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type":   "llama"}'
    assert open_checkpoint(tmp_path / "out").layer("a").scale_dtype == "F8_E8M0"
    dequantize_checkpoint(src, tmp_path / "bf16")
    assert not (tmp_path / "bf16" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("style", ["modelopt", "compressed_tensors"])
def test_a_mixture_in_dialects_that_list_modules(llama, tmp_path, style):
    quantize_checkpoint(llama, tmp_path / "q", "fp8_128x128", style=style)
    convert_checkpoint(tmp_path / "q", tmp_path / "out", "nvfp4", only=("*mlp*",), requantize=True)
    checkpoint = open_checkpoint(tmp_path / "out")
    formats = {layer.name.split(".")[3]: layer.format.name for layer in checkpoint.layers}
    assert formats == {"self_attn": "fp8_128x128", "mlp": "nvfp4"}
    said = checkpoint.config["quantization_config"]
    if style == "modelopt":
        assert said["quant_algo"] == "MIXED_PRECISION"
        assert said["quantized_layers"]["model.layers.0.mlp.up_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    else:
        targets = [sorted(group["targets"])[0] for group in said["config_groups"].values()]
        assert sorted(targets) == ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"]


def test_one_format_takes_one_style(models, tmp_path):
    """NVFP4 experts have names of their own in a V4 checkpoint; in another format they take the checkpoint's."""
    convert_checkpoint(models("v4_nvfp4"), tmp_path / "out", "mxfp8", requantize=True)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {(layer.format.name, layer.parts.scale.rsplit(".")[-1]) for layer in checkpoint.layers} == {
        ("mxfp8", "scale")
    }
    assert checkpoint.config["quantization_config"]["quant_method"] == "mxfp8"
