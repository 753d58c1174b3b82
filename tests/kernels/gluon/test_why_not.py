"""Which problems the Hopper kernels take, on described platforms: no GPU needed."""

from dataclasses import replace

import pytest
import torch

from blockscale.formats import get_format
from blockscale.kernels.gluon import KERNELS
from blockscale.numerics import get_numerics
from blockscale.platform import Platform
from blockscale.registry import Problem, select

H200 = Platform.parse("cuda:sm_90+triton=3.6+torch=2.11+cuda=13.0+sms=132")
BF16 = torch.bfloat16


def problem(n: int = 2112, k: int = 7168, format: str = "fp8_128x128", **changes: object) -> Problem:
    return replace(Problem("linear", n, k, BF16, get_format(format)), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "platform", "reasons"),
    [
        (problem(), H200, []),
        (problem(576, 7168), H200, []),
        (problem(192, 720), H200, []),
        (problem(format="fp8_128x128_ue8m0"), H200, []),
        (problem(numerics=get_numerics("deepseek_v3")), H200, []),
        (problem(numerics=get_numerics("deepseek_v4"), format="fp8_128x128_ue8m0"), H200, []),
        (problem(out_dtype=torch.float32, x_dtype=torch.float32), H200, []),
        (problem(), Platform.parse("cuda:sm_100+triton=3.6"), ["uses wgmma, which only sm_90 has, not sm_100"]),
        (problem(), Platform.parse("cuda:sm_90+triton=3.5"), ["needs triton 3.6 or newer, got 3.5"]),
        (problem(), Platform.parse("cuda:sm_90"), ["needs triton 3.6 or newer, got none"]),
        (problem(k=7000), H200, ["K=7000 is not a multiple of 16: TMA wants rows at multiples of 16 bytes"]),
        (
            problem(numerics=get_numerics("weight_only")),
            H200,
            ["multiplies quantized activations, and the numerics leave them as they are"],
        ),
        (
            problem(format="fp8_32x32_ue8m0"),
            H200,
            [
                "weights are fp8_32x32_ue8m0, needs fp8 in blocks of 128x128",
                "activations are fp8_1x32_ue8m0, needs fp8 in groups of 1x128",
            ],
        ),
    ],
)
def test_reasons(case: Problem, platform: Platform, reasons: list[str]) -> None:
    for kernel in KERNELS:
        if kernel.op == "linear":
            assert list(kernel.why_not(case, platform)) == reasons


def test_two_kernels_share_the_rows() -> None:
    plan = select(problem(), H200, kernel="gluon")
    assert plan.layout == "row"
    assert [(s.m_min, s.m_max, s.kernel.name) for s in plan.spans] == [
        (1, 64, "gluon.decode"),
        (65, None, "gluon.prefill"),
    ]
