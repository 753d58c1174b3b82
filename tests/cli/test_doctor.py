"""What doctor says of machines that do not work as they should. It always says something."""

import json
import subprocess
import types

import pytest
import torch
from typer.testing import CliRunner

import blockscale
from blockscale import environment, platform, registry
from blockscale.cli import app
from blockscale.cli.doctor import examine
from blockscale.kernels.reference import Linear


@pytest.fixture(autouse=True, scope="module")
def without_packages():
    """Asking every optional package takes processes and seconds; one test does it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(environment, "packages", list)
    yield
    patch.undo()


def test_what_it_reports():
    report = examine("cpu")
    assert set(report) == {
        "platform", "features", "kernels", "facts", "tools", "operators", "missing", "problems"
    }  # fmt: skip
    assert report["problems"] == []
    assert report["facts"]["torch"] == torch.__version__
    assert {t["name"] for t in report["tools"]} >= {"g++"}
    assert all(row["ran"] == row["accepted"] for row in report["kernels"])
    assert json.loads(json.dumps(report)) == report


def test_every_m_range_is_run():
    rows = []

    class Prefill(Linear):
        name, priority, m_range = "prefill.linear", 10_000, (65, None)

        def run(self, problem, x, w, bias):
            rows.append(x.shape[0])
            return super().run(problem, x, w, bias)

    kernel = blockscale.register(Prefill())
    try:
        row = next(r for r in examine("cpu")["kernels"] if r["kernel"] == "prefill.linear")
    finally:
        blockscale.unregister(kernel)
    assert row["ran"]
    assert set(rows) == {65}


def test_a_broken_driver_is_a_finding(monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    report = examine("cuda")
    assert report["platform"] is None
    assert report["kernels"] == []
    assert report["problems"][0].startswith("device cuda: RuntimeError: CUDA driver initialization failed")
    assert "more lines" not in report["problems"][0]
    shown = CliRunner().invoke(app, ["doctor", "--device", "cuda"])
    assert shown.exit_code == 1  # the device that was asked for does not answer, and the report is whole
    assert "PROBLEM" in shown.stdout
    best = examine()  # nobody asked for cuda: examine what works, and say what does not
    assert best["platform"].startswith("cpu")
    assert "CUDA driver initialization failed" in best["problems"][0]


def test_a_driver_that_answers_and_cannot_compute_is_a_finding(monkeypatch):
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, gcnArchName="")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    report = examine("cuda")
    assert report["platform"] is None
    assert "device cuda" in report["problems"][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_device_is_no_problem_unless_asked_for():
    assert examine()["problems"] == []
    assert "finds none on this machine" in examine("cuda")["problems"][0]


HALF = {
    "raises": ("raise RuntimeError('undefined symbol: _ZN3c10')", "broken: RuntimeError: undefined symbol: _ZN3c10"),
    "missing part": ("import nothing_of_that_name", "broken: ModuleNotFoundError: No module named"),
    "crashes": ("import os; os.kill(os.getpid(), 11)", "broken: importing it ends the process with signal 11"),
    "fine": ("", "there"),
}  # fmt: skip


@pytest.mark.parametrize("how", HALF)
def test_a_half_installed_package_is_a_finding(how, tmp_path, monkeypatch):
    source, state = HALF[how]
    (tmp_path / "half_of_it.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert environment._package("half_of_it").startswith(state)
    assert environment._package("no_such_package") == "missing"


def test_a_module_without_a_spec_or_metadata_does_not_stop_detection(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "deep_gemm", types.ModuleType("deep_gemm"))  # its __spec__ is None
    assert not platform._importable("deep_gemm")
    (tmp_path / "deep_gemm-9.dist-info").mkdir()
    (tmp_path / "deep_gemm-9.dist-info" / "METADATA").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert platform._package_version("deep_gemm") == ""
    assert platform.detect("cpu").kind == "cpu"


def test_what_is_missing_comes_with_a_command(monkeypatch):
    tools = [
        environment.Tool("g++", "missing", "builds cpu.native", "apt-get install g++"),
        environment.Tool("nvcc", "missing", "not needed", "install the CUDA toolkit"),
    ]
    monkeypatch.setattr(environment, "compilers", lambda: tools)
    monkeypatch.setattr(platform, "_cpu_native", list)
    assert [(m["name"], m["command"]) for m in examine("cpu")["missing"]] == [("g++", "apt-get install g++")]


def test_what_would_not_serve_here_is_not_recommended(monkeypatch):
    tools = [
        environment.Tool(name, "missing", "brings", "get it") for name in ("triton", "deep_gemm", "vllm_xpu_kernels")
    ]
    monkeypatch.setattr(environment, "packages", lambda: tools)
    assert examine("cpu")["missing"] == []


def test_a_device_of_no_known_name_is_a_finding():
    report = examine("gpu")
    assert report["platform"] is None
    assert "need cpu, cuda, xpu or another that torch knows" in report["problems"][0]
    assert CliRunner().invoke(app, ["doctor", "--device", "gpu"]).exit_code == 1


def test_an_entry_point_that_cannot_be_loaded_is_a_finding(monkeypatch):
    from importlib import metadata

    def load(self):
        raise ImportError("libfoo.so.3: cannot open shared object file")

    entry = metadata.EntryPoint("half", "half_of_it:KERNELS", registry.ENTRY_POINTS)
    monkeypatch.setattr(metadata.EntryPoint, "load", load)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == registry.ENTRY_POINTS else [])
    report = examine("cpu")
    assert "half_of_it:KERNELS cannot be loaded: ImportError: libfoo.so.3" in report["problems"][0]
    assert all(row["ran"] == row["accepted"] for row in report["kernels"])


def test_torch_and_triton_must_fit(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(environment.metadata, "version", lambda name: "3.5.1")
    assert environment.pairing() == "torch 2.13.0+cpu goes with triton 3.7, got 3.5.1: pip install 'triton==3.7.*'"
    monkeypatch.setattr(environment.metadata, "version", lambda name: "3.7.1")
    assert environment.pairing() is None


def test_compilers_that_do_not_answer(monkeypatch):
    def stuck(*args, **kwargs):
        raise subprocess.TimeoutExpired("g++", 10)

    monkeypatch.setattr(environment.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(environment.subprocess, "run", stuck)
    assert all(tool.state.startswith("broken: ") for tool in environment.compilers())
