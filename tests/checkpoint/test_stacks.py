"""Experts stored as one tensor: quantized one by one, or left alone with a reason that is heard."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from blockscale import reference
from blockscale.checkpoint import open_checkpoint, quantize_checkpoint
from blockscale.checkpoint.stacks import find_stacks
from blockscale.cli import app
from blockscale.errors import CheckpointError
from blockscale.tensor import BlockScaled

E, H, INNER = 3, 160, 96  # neither 2 INNER nor H is a multiple of 128: blocks end with their expert
UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def fused(path, up=(E, 2 * INNER, H), down=(E, H, INNER)):
    path.mkdir()
    g = torch.Generator().manual_seed(5)
    tensors = {UP: torch.randn(up, generator=g).bfloat16(), DOWN: torch.randn(down, generator=g).bfloat16()}
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.randn(64, 64, generator=g).bfloat16()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    return tensors


@pytest.mark.parametrize("fmt", ["fp8_128x128", "fp8_32x32_ue8m0", "fp8_row", "fp8_tensor", "mxfp8", "mxfp4", "nvfp4"])
def test_each_expert_is_quantized_as_if_alone(tmp_path, fmt):
    tensors = fused(tmp_path / "a")
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", fmt)
    found = open_checkpoint(tmp_path / "b")
    for name in (UP, DOWN):
        stored = found.load(name)
        assert isinstance(stored, BlockScaled)
        assert stored.format.name == fmt
        for e in range(E):
            alone = reference.quantize(tensors[name][e], stored.format)
            assert torch.equal(stored.data[e].view(torch.uint8), alone.data.view(torch.uint8)), (name, e)
            assert torch.equal(
                reference.dequantize(alone),
                reference.dequantize(
                    BlockScaled(
                        stored.data[e], stored.scale[e], stored.format, shape=stored.shape[1:],
                        global_scale=None if stored.global_scale is None else stored.global_scale[e],
                    )
                ),
            )  # fmt: skip


def test_slabs_and_workers_do_not_show(tmp_path, monkeypatch):
    from blockscale.checkpoint import source

    fused(tmp_path / "a")
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", "fp8_128x128", report="none")
    monkeypatch.setattr(source, "SLAB", 1)
    quantize_checkpoint(tmp_path / "a", tmp_path / "c", "fp8_128x128", report="none")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "bc")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n].view(torch.uint8), two[n].view(torch.uint8)) for n in one)


def test_transposed_ones_are_left_and_said(tmp_path):
    fused(tmp_path / "a", up=(E, H, 2 * INNER), down=(E, INNER, H))
    done = CliRunner().invoke(app, ["quantize", str(tmp_path / "a"), str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    assert "NOT quantized: model.layers.*.mlp.experts.gate_up_proj (1 of them): stored transposed" in done.output
    report = json.loads((tmp_path / "b" / "quantization_report.json").read_text())
    assert {left["name"] for left in report["summary"]["left"]} == {UP, DOWN}
    assert "stored transposed" in (tmp_path / "b" / "quantization_report.html").read_text()
    said = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert set(said["modules_to_not_convert"]) >= {UP, DOWN}
    assert open_checkpoint(tmp_path / "b").tensors[UP].dtype == "BF16"


def test_a_globs_choice_is_no_surprise(tmp_path):
    fused(tmp_path / "a")
    done = CliRunner().invoke(
        app, ["quantize", str(tmp_path / "a"), str(tmp_path / "b"), "--skip", "*experts*", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1])["left"] == []
    assert open_checkpoint(tmp_path / "b").tensors[UP].dtype == "BF16"


@pytest.mark.parametrize(
    ("up", "down", "says"),
    [
        ((E, 2 * INNER, H), (E, H, INNER), ""),
        ((E, H, 2 * INNER), (E, INNER, H), "transposed"),
        ((E, 2 * INNER, H), (E, 2 * INNER, H), "do not belong together"),
    ],
)
def test_orientation(tmp_path, up, down, says):
    from blockscale.checkpoint.encode import make_encoding
    from blockscale.formats import get_format

    fused(tmp_path / "a", up, down)
    tensors = open_checkpoint(tmp_path / "a").tensors
    found = find_stacks(tensors, make_encoding(get_format("fp8_128x128")))
    assert found.keys() == {UP, DOWN}
    assert all(says in reason and bool(says) == bool(reason) for reason in found.values())
    blocks = find_stacks(tensors, make_encoding(get_format("fp8_128x128"), "modelopt"))
    assert all(reason for reason in blocks.values())


def test_nothing_else_to_quantize_says_why(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    save_file({UP: torch.ones(2, 64, 32, dtype=torch.bfloat16)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate_up_proj: a stack without its counterpart"):
        quantize_checkpoint(path, tmp_path / "b", "fp8_128x128")


def test_a_nan_names_its_expert(tmp_path):
    tensors = fused(tmp_path / "a")
    tensors[DOWN][1, 2, 3] = float("nan")
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.down_proj\[1\]: nan at \[2, 3\]"):
        quantize_checkpoint(tmp_path / "a", tmp_path / "b", "fp8_128x128")
