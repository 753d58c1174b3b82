"""The commands: JSON that scripts can rely on, and exit codes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from blockscale.checkpoint.errors import InexactError
from blockscale.cli import app
from blockscale.errors import BlockscaleError, CheckpointError


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


def test_quantize_then_inspect(llama, tmp_path):
    result = run("quantize", llama, tmp_path / "out", "--format", "fp8_128x128", "--json")
    assert result.exit_code == 0
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [e["event"] for e in events] == ["start", "shard", "shard", "done"]
    assert events[-1] | {"path": "", "worst": [], "mean_relative_error": 0, "max_relative_error": 0} == {
        "event": "done", "path": "", "existed": False, "shards": 2, "kept": 0, "tensors": 12, "measured": 7,
        "mean_relative_error": 0, "max_relative_error": 0, "worst": [], "left": [],
    }  # fmt: skip
    assert 0.02 < events[-1]["mean_relative_error"] <= events[-1]["max_relative_error"] < 0.03
    again = run("quantize", llama, tmp_path / "out", "--format", "fp8_128x128", "--json")
    assert json.loads(again.stdout) == events[-1] | {"existed": True, "kept": 2}
    again = run("quantize", llama, tmp_path / "out", "--format", "fp8_128x128")
    assert (again.exit_code, "complete already" in again.stdout) == (0, True)
    found = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert found["layers"] == 7
    assert found["model_type"] == "llama"
    assert found["formats"][0] | {"bytes": 0} == {
        "format": "fp8_128x128",
        "scale_dtype": "F32",
        "layers": 7,
        "ragged": 3,
        "bytes": 0,
        "bits_per_weight": pytest.approx(8.003, abs=0.003),
    }
    assert found["plain"]["BF16"]["tensors"] == 5


def test_inspect_for_people(models, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = run("inspect", models("v4")).stdout
    assert "fp8_128x128_ue8m0" in out
    assert "mxfp4" in out
    assert "bits per weight" in out


@pytest.mark.parametrize(
    "args",
    [("--nan", "zero"), ("--scales", "best"), ("--report", "some"), ("--shard-size", "2T"), ("--format", "fp9")],
)
def test_words_that_do_not_exist(llama, tmp_path, args):
    with pytest.raises(BlockscaleError):
        run("quantize", llama, tmp_path / "out", *args)
    assert not (tmp_path / "out").exists()


def test_convert_dequantize_verify(models, tmp_path):
    v4 = models("v4")
    assert run("convert", v4, tmp_path / "f32", "--scale-dtype", "f32", "--json").exit_code == 0
    same = run("verify", v4, tmp_path / "f32", "--json")
    report = json.loads(same.stdout)
    assert (same.exit_code, report["same_values"], report["identical"], report["structure"]) == (0, True, False, [])
    assert run("dequantize", v4, tmp_path / "bf16", "--json").exit_code == 0
    assert run("verify", v4, tmp_path / "bf16").exit_code == 0
    with pytest.raises(InexactError, match="would change values"):
        run("convert", tmp_path / "f32", tmp_path / "x", "--format", "nvfp4")


def test_an_error_is_a_json_line_too(llama, tmp_path):
    with pytest.raises(CheckpointError, match="no tensor to quantize"):
        run("quantize", llama, tmp_path / "out", "--only", "nothing", "--json")
    command = [sys.executable, "-m", "blockscale", "quantize", str(llama), str(tmp_path / "out"), "--json"]
    done = subprocess.run([*command, "--only", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    event = json.loads(done.stdout)
    assert event["event"] == "error"
    assert done.stderr == f"error: {event['message']}\n"


def test_verify_of_different_checkpoints(llama, tmp_path):
    run("quantize", llama, tmp_path / "q", "--format", "fp8_128x128", "--json")
    result = run("verify", llama, tmp_path / "q")
    assert (result.exit_code, "FAILED" in result.stdout) == (1, True)
    assert run("verify", llama, tmp_path / "q", "--max-error", "0.05").exit_code == 0


def test_an_infinite_error_is_null(tmp_path):
    """JSON has no word for it, and most readers refuse Python's."""
    for name, top in (("a", 1.0), ("b", torch.nan)):
        (tmp_path / name).mkdir()
        save_file({"x": torch.tensor([top, 1.0])}, tmp_path / name / "model.safetensors")
    result = run("verify", tmp_path / "a", tmp_path / "b", "--json")
    answer = json.loads(result.stdout, parse_constant=lambda word: pytest.fail(word))
    assert (result.exit_code, answer["passed"], answer["max_relative_error"]) == (1, False, None)


def test_the_message_and_the_exit_code_of_bad_input(llama, tmp_path):
    """As a user sees it: one line on stderr, exit code 2, no traceback."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\xff" * 16)
    command = [sys.executable, "-m", "blockscale", "inspect", str(tmp_path / "bad")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/bad/model.safetensors: header claims")
    assert len(done.stderr.splitlines()) == 1
    (tmp_path / "bad" / "model.safetensors").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json: header claims .*; needs a safetensors file"):
        run("inspect", tmp_path / "config.json")
