"""`blockscale explain CKPT` on a whole model: the policy in force, and experts as stacks."""

import json

from typer.testing import CliRunner

from blockscale.cli import app
from makers import make_deepseek_v4


def explain(*args):
    result = CliRunner().invoke(app, ["explain", *map(str, args), "--json"])
    assert result.exception is None, result.output
    return json.loads(result.output)


def test_the_policy_and_its_sources_are_printed(tmp_path):
    folder = make_deepseek_v4(tmp_path / "v4", mtp=False)
    report = explain(folder)
    policy = {row["field"]: row for row in report["policy"]}
    assert policy["grouped_output"]["value"] == "weight_only"
    assert "wo_a is dequantized" in policy["grouped_output"]["source"]
    stacks = [a for a in report["layers"] if a["problem"]["groups"] == 8]
    assert {a["problem"]["numerics"] for a in stacks} == {"deepseek_v4"}
    assert sum(a["layers"] for a in stacks) == 4 * 3  # gate, up and down in each of four layers
    assert {row["value"] for row in explain(folder, "--numerics", "hf")["policy"]} >= {"after the second matrix"}


def test_groups_of_a_composite_model_are_found_in_its_text_config(tmp_path):
    folder = make_deepseek_v4(tmp_path / "v41", block=32, nested=True, mtp=False)
    problems = [layer["problem"] for layer in explain(folder)["layers"]]
    assert [(p["n"], p["k"]) for p in problems if p["groups"] == 2] == [(128, 256)]
