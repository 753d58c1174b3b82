"""The commands: JSON that scripts can rely on, and exit codes."""

import json

import pytest
from typer.testing import CliRunner

from blockscale.cli import app
from blockscale.errors import BlockscaleError
from makers import make_deepseek_v4


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


def test_quantize_then_inspect(llama, tmp_path):
    result = run("quantize", llama, tmp_path / "out", "--format", "fp8_128x128", "--json")
    assert result.exit_code == 0
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [e["event"] for e in events] == ["start", "shard", "shard", "done"]
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


def test_inspect_for_people(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = run("inspect", make_deepseek_v4(tmp_path / "v4", mtp=False)).stdout
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
