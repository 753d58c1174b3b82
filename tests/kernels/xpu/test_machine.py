"""The commands of the XPU-CHECKLIST (docs/xpu.md) on machines that are not here: with and without the package, with a
broken one, and with no Intel GPU at all."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from blockscale import conformance, platform
from blockscale.cli import app, doctor
from blockscale.platform import Platform, detect
from intel import standin

WITHOUT = "xpu:bmg+torch=2.13.0+triton=3.5.0+scaled_mm=no: block-wise scaling is not supported"
PACKAGE = f"{WITHOUT}+vllm-xpu-kernels=0.1.16.2"


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def on(monkeypatch):
    """`on(text)`: doctor takes this machine's CPU for that platform."""
    standin.install()

    def described(text, ops=None):
        found = Platform.parse(text)
        monkeypatch.setattr(doctor, "detect", lambda device: found)

    return described


def test_doctor_without_the_package_says_what_is_missing_and_what_serves_instead(on):
    on(WITHOUT)
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    rows = {(r["op"], r["kernel"]): r for r in json.loads(result.output)["kernels"]}
    for (_, name), row in rows.items():
        if name.startswith("xpu."):
            assert not row["accepted"]
            assert row["reasons"][0] == "needs the package vllm-xpu-kernels, which is not there"
    assert not rows["linear", "torch_scaled.xpu_row"]["accepted"]
    assert "block-wise scaling is not supported" in " ".join(rows["linear", "torch_scaled.xpu_row"]["reasons"])
    assert rows["linear", "reference.linear"]["ran"]
    assert rows["linear", "triton.block"]["accepted"]
    assert not rows["linear", "triton.block"]["ran"]  # this CPU has no Triton driver: reported, and the report goes on


def test_doctor_with_the_package_runs_its_ops(on):
    on(PACKAGE)
    report = doctor.examine("cpu")
    ran = {r["kernel"] for r in report["kernels"] if r["ran"]}
    assert {"xpu.fp8_gemm", "xpu.fp8_gemm_w8a16", "xpu.fp8_bmm", "xpu.group_quantize", "xpu.swiglu_quantize"} <= ran
    broken = [r["kernel"] for r in report["kernels"] if r["accepted"] and not r["ran"]]
    assert not [name for name in broken if name.startswith(("xpu.", "reference."))]


def test_doctor_prints_a_table_that_can_be_pasted(on):
    on(WITHOUT)
    result = run("doctor")
    assert result.exit_code == 0
    assert result.output.startswith(f"platform  {Platform.parse(WITHOUT)}")
    assert "BROKEN linear triton.block" in result.output
    assert "xpu.fp8_gemm: needs the package vllm-xpu-kernels, which is not there" in result.output


def test_explain_shows_the_whole_decision_on_any_machine():
    result = run("explain", "--platform", "xpu:bmg+triton+vllm-xpu-kernels=0.1.16", "--shape", "576,7168")
    assert result.exit_code == 0
    said = result.output
    assert "plan: M 1..: xpu.fp8_gemm" in said
    assert "N=576 is ragged: the weight's scales are repeated to blocks of 128x64" in said
    assert "x is copied where it is not contiguous" in said
    assert "scaled_mm has not been tried on this platform" in said
    order = [
        said.index(f" {n}\n") for n in ("xpu.fp8_gemm", "torch_scaled.xpu_row", "triton.block", "reference.linear")
    ]
    assert order == sorted(order)


def test_conformance_reports_the_package_s_kernels_in_one_document():
    standin.install()
    report = conformance.run("cpu", kernel="xpu", platform=Platform.parse(PACKAGE), quick=True)
    document = report.to_json()
    assert json.loads(json.dumps(document))["platform"].endswith("vllm-xpu-kernels=0.1.16.2")
    assert document["failed"] == 0
    assert document["cases"] == document["passed"] >= 7


@pytest.mark.parametrize("command", ["doctor", "conformance"])
def test_a_machine_without_an_intel_gpu_is_told_so(command):
    assert not torch.xpu.is_available()
    result = run(command, "--device", "xpu")
    assert result.exit_code != 0
    said = f"{result.output} {result.exception}"
    assert f"device xpu: torch {torch.__version__} finds none on this machine" in said
    assert "Traceback" not in result.output


DEVICES = [
    ("xpu:5", "Intel(R) Arc(TM) B580 Graphics", "bmg"),
    ("xpu:6", "Intel(R) Data Center GPU Max 1550", "pvc"),
    ("xpu:7", "Intel(R) Arc(TM) A770 Graphics", "dg2"),
]


@pytest.mark.parametrize(("device", "name", "arch"), DEVICES)
def test_detect_on_a_torch_for_xpu_without_the_package(device, name, arch, monkeypatch):
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 8)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(name=name))
    monkeypatch.setattr(platform, "probe_scaled_mm", lambda device: "no: tried, not there")
    found = detect(device)
    assert (found.kind, found.arch) == ("xpu", arch)
    assert found.value("scaled_mm") == "no: tried, not there"
    assert found.value("vllm-xpu-kernels") is None
    assert found.schema("_xpu_C::fp8_gemm") is None or "_xpu_C" in standin._libraries
    assert Platform.parse(str(found)).features == found.features
