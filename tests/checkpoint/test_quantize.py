"""`quantize`: bytes equal to the definition, configs as the releases have them, and nothing half-written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockscale import get_format, reference
from blockscale.checkpoint import open_checkpoint, quantize_checkpoint
from blockscale.checkpoint import source as source_module
from blockscale.checkpoint.errors import NotFiniteError
from blockscale.errors import CheckpointError, UnknownNameError
from blockscale.layouts import decode_scale
from makers import make_llama

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def everything(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def source_tensors(path):
    return {name: t for shard in sorted(path.glob("*.safetensors")) for name, t in load_file(shard).items()}


@pytest.mark.parametrize(
    ("fmt", "parts", "config"),
    [
        (
            "fp8_128x128",
            {"weight": "F8_E4M3", "weight_scale_inv": "F32"},
            {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
                "modules_to_not_convert": ["lm_head"],
            },
        ),
        (
            "fp8_128x128_ue8m0",
            {"weight": "F8_E4M3", "weight_scale_inv": "F32"},
            {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
                "scale_fmt": "ue8m0",
                "modules_to_not_convert": ["lm_head"],
            },
        ),
        ("fp8_32x32_ue8m0", {"weight": "F8_E4M3", "weight_scale_inv": "F8_E8M0"}, {"weight_block_size": [32, 32]}),
        ("fp8_row", {"weight": "F8_E4M3", "weight_scale": "F32"}, {"quant_method": "compressed-tensors"}),
        ("fp8_tensor", {"weight": "F8_E4M3", "weight_scale": "F32"}, {"format": "float-quantized"}),
        ("mxfp8", {"weight": "F8_E4M3", "weight_scale_inv": "U8"}, {"quant_method": "mxfp8"}),
        ("mxfp4", {"weight_packed": "U8", "weight_scale": "U8"}, {"format": "mxfp4-pack-quantized"}),
        (
            "nvfp4",
            {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32"},
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]},
        ),
    ],
)
def test_every_format_is_the_definition(llama, tmp_path, monkeypatch, fmt, parts, config):
    monkeypatch.setattr(source_module, "SLAB", 192 * 64)  # several slabs a tensor
    quantize_checkpoint(llama, tmp_path / "out", fmt)
    checkpoint = open_checkpoint(tmp_path / "out")
    original = source_tensors(llama)
    assert [layer.name for layer in checkpoint.layers] == [
        n.removesuffix(".weight") for n in checkpoint_order(llama) if n.split("layers.0.")[-1][:-7] in LINEARS
    ]
    for layer in checkpoint.layers:
        q = checkpoint.load(layer.name)
        want = reference.quantize(original[layer.name + ".weight"], get_format(fmt))
        assert (layer.format.name, q.shape) == (fmt, want.shape)
        assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(decode_scale(q.scale), decode_scale(want.scale))
        if want.global_scale is not None:
            assert torch.equal(q.global_scale, want.global_scale)
        stored = {n.removeprefix(layer.name + "."): checkpoint.tensors[n].dtype for n in layer.parts.all}
        assert stored == parts
    for info in checkpoint.plain:
        assert torch.equal(checkpoint.tensor(info.name), original[info.name])
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {key: said[key] for key in config} == config
    assert (tmp_path / "out" / "generation_config.json").is_file()


def checkpoint_order(path):
    return list(open_checkpoint(path).tensors)


def test_the_library_reads_what_we_write(llama, tmp_path):
    quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128", shard_size=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = source_tensors(tmp_path / "out")
    assert sorted(index["weight_map"]) == sorted(found)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert len(set(index["weight_map"].values())) > 2
    save_file(found, tmp_path / "again.safetensors")
    assert all(torch.equal(a.view(torch.uint8), found[n].view(torch.uint8)) for n, a in
               load_file(tmp_path / "again.safetensors").items() if a.dtype == torch.float8_e4m3fn)  # fmt: skip


@pytest.mark.parametrize(
    ("style", "scale_dtype", "fmt", "names"),
    [
        ("deepseek_v4", None, "fp8_128x128_ue8m0", {"weight": "F8_E4M3", "scale": "F8_E8M0"}),
        ("deepseek_v4", "f32", "fp8_128x128_ue8m0", {"weight": "F8_E4M3", "scale": "F32"}),
        ("deepseek_v4", None, "mxfp4", {"weight": "I8", "scale": "F8_E8M0"}),
        ("deepseek", "bf16", "fp8_128x128", {"weight": "F8_E4M3", "weight_scale_inv": "BF16"}),
        ("modelopt", None, "fp8_128x128", {"weight": "F8_E4M3", "weight_scale": "F32"}),
        ("modelopt", None, "mxfp8", {"weight": "F8_E4M3", "weight_scale": "U8"}),
        ("compressed_tensors", None, "fp8_128x128", {"weight": "F8_E4M3", "weight_scale": "F32"}),
        (
            "compressed_tensors",
            None,
            "nvfp4",
            {"weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"},
        ),
    ],
)
def test_styles(llama, tmp_path, style, scale_dtype, fmt, names):
    quantize_checkpoint(llama, tmp_path / "out", fmt, style=style, scale_dtype=scale_dtype)
    checkpoint = open_checkpoint(tmp_path / "out")
    layer = checkpoint.layer("model.layers.0.self_attn.k_proj")
    assert layer.format.name == fmt
    assert {n.split("k_proj.")[1]: checkpoint.tensors[n].dtype for n in layer.parts.all} == names
    original = source_tensors(llama)["model.layers.0.self_attn.k_proj.weight"].float()
    error = (reference.dequantize(checkpoint.load(layer.name)) - original).norm() / original.norm()
    assert error < (0.13 if ("4" in fmt.replace("fp8", "") and "x" not in fmt[3:]) or fmt == "mxfp4" else 0.04)


def test_tied_embeddings_stay(tmp_path):
    src = make_llama(tmp_path / "src", tied=True, layers=1)
    quantize_checkpoint(src, tmp_path / "out", "fp8_128x128")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.tensors["model.embed_tokens.weight"].dtype == "BF16"
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "modules_to_not_convert" not in checkpoint.config["quantization_config"]


def test_only_and_skip(llama, tmp_path):
    quantize_checkpoint(llama, tmp_path / "a", "fp8_128x128", only=("*.mlp.*",), skip=("*.up_proj",))
    names = {layer.name.split(".")[-1] for layer in open_checkpoint(tmp_path / "a").layers}
    assert names == {"gate_proj", "down_proj"}
    said = open_checkpoint(tmp_path / "a").quantization.skip
    assert {n.split(".")[-1] for n in said} == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "lm_head"}
    with pytest.raises(CheckpointError, match="no tensor to quantize"):
        quantize_checkpoint(llama, tmp_path / "b", "fp8_128x128", only=("nothing*",))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_is_an_error_or_kept(llama, tmp_path, bad):
    src = tmp_path / "src"
    shutil.copytree(llama, src)
    shard = src / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name][5, 7] = bad
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(NotFiniteError) as e:
        quantize_checkpoint(src, tmp_path / "out", "fp8_128x128")
    assert f"{shard}: {name}: {bad} at [5, 7]" in str(e.value)
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(src, tmp_path / "kept", "fp8_128x128", nan="keep")
    q = open_checkpoint(tmp_path / "kept").load("model.layers.0.self_attn.k_proj")
    assert q.data.view(torch.uint8)[5, 7] == 0x7F
    assert int((q.data.view(torch.uint8) & 0x7F == 0x7F).sum()) == 1


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_nan_that_fp4_cannot_hold_is_not_kept(llama, tmp_path, fmt):
    """It would be a NaN scale, and no reader of ours takes those."""
    with pytest.raises(CheckpointError, match=f"--nan keep: {fmt} has no code for NaN"):
        quantize_checkpoint(llama, tmp_path / "out", fmt, nan="keep")
    assert not list(tmp_path.iterdir())


def test_huge_finite_weights_are_no_nan(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    save_file({"a.weight": torch.full((128, 128), 3e38)}, src / "model.safetensors")
    quantize_checkpoint(src, tmp_path / "out", "fp8_128x128")
    assert reference.dequantize(open_checkpoint(tmp_path / "out").load("a"))[0, 0] == pytest.approx(3e38)


def test_sources_that_cannot_be_quantized(llama, tmp_path):
    quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128")
    with pytest.raises(CheckpointError, match="is fp8_128x128 already; use convert"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", "mxfp8")
    with pytest.raises(UnknownNameError, match="did you mean"):
        quantize_checkpoint(llama, tmp_path / "x", "fp8_128x12b")
    with pytest.raises(CheckpointError, match="style deepseek cannot describe nvfp4"):
        quantize_checkpoint(llama, tmp_path / "x", "nvfp4", style="deepseek")
    with pytest.raises(CheckpointError, match="scales are stored in one of"):
        quantize_checkpoint(llama, tmp_path / "x", "fp8_128x128", scale_dtype="e8m0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_the_report(llama, tmp_path):
    quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128", report="full")
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["summary"]["tensors"] == 7
    original = source_tensors(llama)
    for row in report["tensors"]:
        w = original[row["name"] + ".weight"].float()
        y = reference.dequantize(reference.quantize(w, get_format("fp8_128x128")))
        assert row["relative_error"] == pytest.approx(float((w - y).norm() / w.norm()), rel=1e-5)
        assert row["measured"] == w.numel()
        assert row["clipped"] == 0
        assert row["amax"] == float(w.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(576, 200), (192, 576), (256, 128), (129, 257), (1, 1), (127, 640)])
def test_deepseeks_rule_for_ragged_weights(tmp_path, shape, dtype):
    """Zero-pad to whole blocks, quantize, crop (s = amax / 448, q = w / s): spelled out without any code of ours."""
    src = tmp_path / "src"
    src.mkdir()
    w = torch.randn(shape).to(dtype)
    save_file({"kv_a_proj_with_mqa.weight": w}, src / "model.safetensors")
    quantize_checkpoint(src, tmp_path / "out", "fp8_128x128")
    (n, k), (tall, wide) = shape, (-(-size // 128) for size in shape)
    padded = torch.zeros(tall * 128, wide * 128)
    padded[:n, :k] = w
    blocks = padded.view(tall, 128, wide, 128)
    scale = blocks.abs().amax((1, 3)) / 448.0
    data = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(tall * 128, wide * 128)[:n, :k]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["kv_a_proj_with_mqa.weight"].view(torch.uint8), data.contiguous().view(torch.uint8))
    assert torch.equal(found["kv_a_proj_with_mqa.weight_scale_inv"], scale)
