"""The reference as kernels: what is more than a call of `reference`."""

from dataclasses import replace

import pytest
import torch

from blockscale import get_format, registry
from blockscale.kernels import reference as kernels
from blockscale.numerics import get_numerics
from blockscale.platform import Platform
from blockscale.registry import Problem


@pytest.mark.parametrize("bias", [None, torch.arange(3).bfloat16()])
def test_cuda_is_asked_for_an_fp32_sum(monkeypatch, bias):
    """torch's bf16 result lets cuBLAS add the parts of a split K in bf16; the one in fp32 cannot."""
    asked = {}

    def mm(a, b, *, out_dtype):
        asked["dtype"] = out_dtype
        return a.float() @ b.float()

    monkeypatch.setattr(kernels, "detect", lambda device: Platform("cuda", "sm_90"))
    monkeypatch.setattr(torch, "mm", mm)
    x, weight = torch.randn(2, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    problem = Problem("dense_linear", 3, 64, torch.bfloat16, None, w_dtype=torch.bfloat16)
    y = kernels.DenseLinear().run(problem, x, weight, bias)
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert asked == {"dtype": torch.float32}
    assert y.dtype == torch.bfloat16
    assert ((y.double() - want).abs() <= 2**-8 * want.abs() + 1e-5).all()  # one rounding, of the result


@pytest.mark.parametrize(
    ("platform", "op"),
    [
        ("cpu:avx2+cpu-native=avx2", "linear"),
        ("cpu:avx2+cpu-native=avx2", "grouped_linear"),
    ],
)
def test_explain_says_where_nvfp4_activations_are_slow(platform, op):
    problem = Problem(op, 256, 256, torch.bfloat16, get_format("nvfp4"), groups=8 * (op == "grouped_linear"))
    accepted = [d for d in registry.explain(problem, Platform.parse(platform)) if d.accepted]
    assert [d.kernel.name for d in accepted] == [f"reference.{op}"]
    assert "only in Triton, none on a CPU" in accepted[0].notes[-1]
    weight_only = replace(problem, numerics=get_numerics("checkpoint,nvfp4_act=None"))
    best = next(d for d in registry.explain(weight_only, Platform.parse(platform)) if d.accepted)
    assert not best.kernel.name.startswith("reference.")


@pytest.mark.parametrize("platform", ["cuda:sm_90+triton=3.6", "rocm:gfx942+triton=3.6", "xpu:bmg+triton=3.6"])
@pytest.mark.parametrize("op", ["linear", "grouped_linear"])
def test_triton_serves_nvfp4_activations(platform, op):
    problem = Problem(op, 256, 256, torch.bfloat16, get_format("nvfp4"), groups=8 * (op == "grouped_linear"))
    best = next(d for d in registry.explain(problem, Platform.parse(platform)) if d.accepted)
    assert best.kernel.name == "triton.block"
