"""scaled_mm on XPU is used where a tiny run was right, and nowhere else."""

import pytest
import torch
from torch.nn import functional as F

from blockscale.conformance import Case, check
from blockscale.formats import get_format
from blockscale.kernels.xpu.scaled_mm import KERNELS
from blockscale.platform import Platform, probe_scaled_mm
from blockscale.registry import Problem, explain

ROW, COLUMN = KERNELS
CPU = torch.device("cpu")


def multiply(lie, factor=1.0):
    """A scaled_mm that demands its scales by row or by column."""

    def scaled_mm(a, b, a_scale, a_kind, b_scale, b_kind, *, output_dtype):
        for scale in (a_scale, b_scale):
            if scale.is_contiguous() != (lie == "row") and 1 not in scale.shape:
                raise ValueError(f"scales must lie by {lie}")
        x = a.double() * a_scale.repeat_interleave(128, 1)
        w = b.double().mT * b_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return (x @ w.mT * factor).to(output_dtype)

    return scaled_mm


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.lie)
def test_the_probe_finds_how_scales_lie_and_the_kernel_conforms(kernel, monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", multiply(kernel.lie))
    assert probe_scaled_mm(CPU) == kernel.lie
    failure, _ = check(kernel, Case("linear", "fp8_128x128", 5, 256, 384))
    assert failure is None


def test_the_probe_distrusts_wrong_numbers(monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", multiply("row", factor=1.02))
    assert probe_scaled_mm(CPU).startswith("no: ")


def test_the_probe_keeps_what_was_raised(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("block-wise scaling is not supported on XPU")

    monkeypatch.setattr(F, "scaled_mm", refuse)
    assert probe_scaled_mm(CPU) == "no: block-wise scaling is not supported on XPU"


@pytest.mark.parametrize(
    ("features", "accepted"),
    [("", []), ("+scaled_mm=row", ["torch_scaled.xpu_row"]), ("+scaled_mm=column", ["torch_scaled.xpu_column"]),
     ("+scaled_mm=no: it ran and gave wrong numbers", [])],
)  # fmt: skip
def test_only_the_verdict_counts_and_it_ranks_between_the_package_and_triton(features, accepted):
    platform = Platform.parse(f"xpu:bmg+triton=3.6+torch=2.13+vllm-xpu-kernels=0.1.16.2{features}")
    problem = Problem("linear", 256, 512, torch.bfloat16, get_format("fp8_128x128"))
    names = [d.kernel.name for d in explain(problem, platform) if d.accepted]
    assert [n for n in names if n.startswith("torch_scaled")] == accepted
    assert names.index("xpu.fp8_gemm") == 0
    if accepted:
        assert names.index(accepted[0]) < names.index("triton.block")
