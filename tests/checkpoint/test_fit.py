"""`inspect`'s verdict for 1 to 16 ranks says what the sharding plan does."""

import json

import pytest
from typer.testing import CliRunner

from blockscale.checkpoint import open_checkpoint
from blockscale.cli import app
from blockscale.cli._fit import kind_of, verdicts
from blockscale.parallel.planner import plan_sharding
from blockscale.parallel.summary import summarize
from blockscale.policy import model_policy


def rows_of(path):
    checkpoint = open_checkpoint(path)
    return {row["ranks"]: row for row in verdicts(checkpoint, model_policy("reference", checkpoint.config))}


def counts(row):
    return [row[kind] for kind in ("whole", "aligned", "inside", "unused", "unequal")]


@pytest.mark.parametrize(
    ("model", "ranks", "verdict", "numbers"),
    [
        ("v41", 1, "on block boundaries", [130, 0, 0, 0, 0]),
        ("v41", 2, "on block boundaries", [8, 122, 0, 0, 0]),  # blocks of 32
        ("v4", 2, "re-block", [8, 78, 44, 0, 0]),  # the same in blocks of 128
        ("v4_nvfp4", 2, "re-block", [8, 110, 12, 34, 0]),  # 34 of the multi-token prediction layer
        ("v4_nvfp4", 3, "re-block", [12, 96, 22, 34, 118]),
        ("qwen3", 2, "re-block", [0, 4, 52, 0, 0]),
        ("qwen3", 16, "re-block", [0, 0, 56, 0, 48]),
    ],
)
def test_verdicts(models, model, ranks, verdict, numbers):
    row = rows_of(models(model))[ranks]
    assert (row["verdict"], counts(row)) == (verdict, numbers)


def test_what_and_why(models):
    assert "model.layers.*.mlp.experts.*.gate_proj" in rows_of(models("qwen3"))[2]["kinds"]["inside"]
    assert rows_of(models("minimax"))[2]["reasons"] == ["q_norm runs over all heads together"]
    assert kind_of("model.layers.3.mlp.experts.17.w1") == "model.layers.*.mlp.experts.*.w1"


@pytest.mark.parametrize("model", ["v3", "v4", "minimax"])
def test_the_verdict_is_that_of_the_plan(models, model):
    """Where `--tp N` re-blocks something, so does the verdict for N, and only there."""
    checkpoint = open_checkpoint(models(model))
    for ranks, row in rows_of(models(model)).items():
        planned = summarize(plan_sharding(checkpoint, ranks))["rows"]
        inside = sum(r["layers"] for r in planned if r["part_formats"] or r["cut_groups"])
        assert row["inside"] >= inside
        assert (row["inside"] > 0) == (inside > 0)


def test_no_plan_is_a_verdict(models, monkeypatch):
    """NVFP4 that quantizes activations with a global scale cannot be cut along K."""
    checkpoint = open_checkpoint(models("v4_nvfp4"))
    done = CliRunner().invoke(app, ["inspect", str(checkpoint.path), "--json", "--numerics", "vllm"])
    assert done.exit_code == 0, done.output
    assert [row["ranks"] for row in json.loads(done.output)["tensor_parallel"]] == list(range(1, 17))
