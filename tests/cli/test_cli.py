import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import blockscale
from blockscale.cli import app, main
from blockscale.kernels.reference import Linear


def run(*args):
    return CliRunner().invoke(app, list(args))


@pytest.mark.parametrize(
    "platform", ["xpu:bmg+triton", "rocm:gfx942", "cuda:sm_90+triton=3.6", "cuda:sm_75", "cpu:neon"]
)
def test_explain_answers_for_any_platform(platform):
    result = run("explain", "--shape", "192,576", "--platform", platform, "--json")
    answer = json.loads(result.stdout)
    assert result.exit_code == 0
    assert answer["platform"] == str(blockscale.Platform.parse(platform))
    assert answer["plan"][-1]["m_max"] is None
    assert answer["problem"]["activation_format"] == "fp8_1x128"
    for decision in answer["decisions"]:
        assert decision["accepted"] == (decision["reasons"] == [])
    kernels = {k.name for k in blockscale.registry.kernels() if k.op == "linear"}
    assert {d["kernel"] for d in answer["decisions"]} == kernels


def test_explain_prints_a_table():
    result = run("explain", "--shape", "192,576", "--platform", "xpu:bmg+triton")
    assert "plan: M 1..: reference.linear" in result.stdout or "plan: M 1..: triton" in result.stdout
    assert "reference.linear" in result.stdout


def test_three_numbers_are_experts():
    answer = json.loads(run("explain", "--shape", "8,192,576", "--json").stdout)
    assert (answer["problem"]["op"], answer["problem"]["groups"]) == ("grouped_linear", 8)


def test_explain_says_what_a_bare_platform_lacks():
    assert "with one: xpu:bmg+triton" in run("explain", "--shape", "192,576", "--platform", "xpu:bmg").stdout


def test_explain_says_that_a_kind_is_unknown():
    """Third parties may bring their own, so it is no error; a slip of the finger it often is."""
    text = run("explain", "--shape", "192,576", "--platform", "cude:sm_90+triton").stdout
    assert "kind 'cude' is none of ours (cpu, cuda, rocm, xpu)" in text
    assert "none of ours" not in run("explain", "--shape", "192,576", "--platform", "xpu:bmg").stdout


def test_a_decision_reads_as_a_line():
    problem = blockscale.linear_problem(blockscale.quantize(torch.ones(2, 16), "fp8_1x16"), torch.bfloat16)
    lines = [str(d) for d in blockscale.explain(problem, blockscale.Platform.parse("cpu"))]
    assert "reference.linear: accepts" in lines
    assert any(line.startswith("gluon.decode: uses wgmma, which only sm_90 has") for line in lines)


def test_doctor_runs_what_it_calls_usable():
    report = json.loads(run("doctor", "--json").stdout)
    assert report["platform"].startswith("cpu")
    by_name = {(row["op"], row["kernel"]): row for row in report["kernels"]}
    assert by_name["linear", "reference.linear"]["ran"] is True
    assert by_name["linear", "reference.linear"]["max_error"] < 1
    assert all(row["ran"] == row["accepted"] for row in report["kernels"])


class Broken(Linear):
    name = "broken.linear"
    priority = 10_000

    def run(self, problem, x, w, bias):
        raise RuntimeError("driver too old")


def test_doctor_survives_a_broken_kernel():
    kernel = blockscale.register(Broken())
    try:
        result = run("doctor", "--json")
    finally:
        blockscale.unregister(kernel)
    row = next(r for r in json.loads(result.stdout)["kernels"] if r["kernel"] == "broken.linear")
    assert (row["accepted"], row["ran"]) == (True, False)
    assert "driver too old" in row["reasons"][0]


def test_conformance_exits_1_on_a_fault_and_0_without():
    assert run("conformance", "--quick", "--kernel", "reference").exit_code == 0
    kernel = blockscale.register(Broken())
    try:
        result = run("conformance", "--quick", "--kernel", "broken")
    finally:
        blockscale.unregister(kernel)
    assert result.exit_code == 1
    assert "driver too old" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explain"], "needs either a checkpoint or --shape"),
        (["explain", "--shape", "192"], "--shape needs N,K"),
        (["explain", "--shape", "192,576", "--format", "fp8_129"], "did you mean"),
        (["explain", "--shape", "192,576", "--platform", "!"], "need kind"),
        (["explain", "--shape", "192,576", "--dtype", "int8"], "--dtype needs one of"),
        (["explain", "--shape", "192,576", "--platform", "cuda:a100"], "need 'cuda:sm_80+triton' for that chip"),
        (["explain", "--shape", "192,576", "--platform", "MI300X"], "need 'rocm:gfx942+triton' for that chip"),
        (["explain", "--shape", "192,576", "--platform", "rocm:sm_90"], "need the chip's generation, e.g. rocm:gfx942"),
        (["explain", "--shape", "192,576", "--op", "masked_linear"], "masked_linear needs --shape E,N,K"),
        (["explain", "--shape", "8,192,576", "--op", "linear"], "linear needs --shape N,K"),
        (["explain", "a checkpoint", "--format", "mxfp4"], "--format and --op describe --shape"),
        (["explain", "a checkpoint", "--shape", "2,3"], "needs either a checkpoint or --shape N,K, got both"),
        (["explain", "--shape", "0,576"], "--shape needs whole numbers from 1 up, got '0,576'"),
        (["explain", "--shape", "8,192,-576"], "--shape needs whole numbers from 1 up, got '8,192,-576'"),
        (["explain", "--shape", "192,576", "--device", "gpu"], "device 'gpu': need cpu, cuda, xpu or another"),
        (["explain", "--shape", "192,576", "--numerics", "hf"], "--numerics hf needs a checkpoint, whose config"),
        (["explain", "--shape", "192,576", "--numerics", "refrence"], "did you mean 'reference'"),
        (["conformance", "--html", "/nowhere/x.html"], "--html: needs a file in a folder that is there"),
        (["bench", "model", "/nowhere", "--picture", "/nowhere/x.png"], "--picture: needs a file in a folder that is"),
        (["bench", "model", "/nowhere", "--picture", "x.bmp"], "needs a name ending in .png or .svg, got x.bmp"),
        (["bench", "model", "/nowhere"], "/nowhere: no such checkpoint"),
        (["verify", "/a", "/b", "--logits", "--text", "/nowhere"], "No such file or directory: /nowhere"),
        (["conformance", "--kernel", "nothing"], "unknown kernel 'nothing'"),
        (["conformance", "--device", "gpu"], "device 'gpu': need cpu, cuda, xpu or another"),
        (["run", "/nowhere", "hello"], "/nowhere: no such checkpoint"),
    ],
)
def test_errors_are_one_line_and_exit_2(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["blockscale", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("BLOCKSCALE_LOG", "decision", "unknown log topic 'decision'; did you mean 'decisions'? (BLOCKSCALE_LOG)"),
        ("BLOCKSCALE_SELF_TEST", "yes", "BLOCKSCALE_SELF_TEST: needs 0 or 1, got 'yes'"),
        ("BLOCKSCALE_KERNEL", "quantize", "BLOCKSCALE_KERNEL: got 'quantize', need op=kernel"),
        ("BLOCKSCALE_KERNEL", "linear=cpu.nativ", "'cpu.slices'? (BLOCKSCALE_KERNEL)"),
    ],
)
def test_a_variable_with_a_value_that_does_not_exist_is_an_error_and_no_traceback(variable, value, message):
    """In a process of its own: some are read when the package is imported."""
    command = [sys.executable, "-m", "blockscale", "explain", "--shape", "192,576"]
    if variable == "BLOCKSCALE_SELF_TEST":
        command = [*command[:3], "doctor"]  # which would take it for a device that does not answer
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, variable: value})
    assert (done.returncode, done.stdout.count("plan")) == (2, 0)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_terminal_without_unicode_loses_no_result():
    command = [sys.executable, "-m", "blockscale", "explain", "--shape", "192,576", "--platform", "!"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert "need kind[:arch][+feature[=value]]?" in done.stderr


def test_a_text_that_is_none(tmp_path):
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    told = run("verify", "/a", "/b", "--logits", "--text", str(tmp_path / "text")).exception
    assert isinstance(told, blockscale.BlockscaleError)
    assert str(told).startswith(f"{tmp_path}/text: needs text in UTF-8")


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"{blockscale.__version__}\n")


def test_python_m_is_the_command_line():
    result = subprocess.run([sys.executable, "-m", "blockscale", "--help"], capture_output=True, text=True, check=True)
    assert "conformance" in result.stdout
