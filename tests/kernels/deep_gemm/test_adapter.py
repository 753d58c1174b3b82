"""The adapter's side of DeepGEMM's contract, with a stand-in for the library that checks what it is handed."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blockscale import reference
from blockscale.formats import get_format
from blockscale.kernels.deep_gemm import Matmul
from blockscale.layouts import convert
from blockscale.platform import Platform
from blockscale.registry import Problem

BF16 = torch.bfloat16


def problem(n: int = 192, k: int = 384, **changes: object) -> Problem:
    act = get_format("fp8_1x128")
    base = Problem("matmul", n, k, act.element.dtype, get_format("fp8_128x128"), out_dtype=BF16, x_format=act)
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["row", "tma"])
def test_operands_follow_the_contract(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    x = convert(reference.quantize(torch.randn(5, 384), get_format("fp8_1x128")), layout)
    w = reference.quantize(torch.randn(192, 384), get_format("fp8_128x128"))

    def fp8_gemm_nt(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, *, disable_ue8m0_cast: bool) -> None:
        assert disable_ue8m0_cast
        assert a[1].shape == (5, 3)
        assert a[1].stride() == (1, 8)  # columns start at multiples of 16 bytes
        assert b[1].shape == (2, 3)
        assert b[1].is_contiguous()
        assert d.dtype == BF16
        d.copy_(reference.matmul(x, w, BF16))

    monkeypatch.setitem(sys.modules, "deep_gemm", types.SimpleNamespace(fp8_gemm_nt=fp8_gemm_nt))
    got = Matmul().run(problem(), x, w)
    assert torch.equal(got, reference.matmul(x, w, BF16))


@pytest.mark.parametrize(
    ("case", "platform", "reasons"),
    [
        (problem(), "cuda:sm_90+deep_gemm=2.8.1", []),
        (problem(), "cuda:sm_90", ["the package deep_gemm is not installed"]),
        (
            problem(n=100, k=200, out_dtype=torch.float32),
            "cuda:sm_90+deep_gemm=2.8.1",
            [
                "K=200 is not a multiple of 128",
                "N=100 is not a multiple of 8: rows of the result start at multiples of 16 bytes",
                "out is torch.float32, needs bfloat16",
            ],
        ),
    ],
)
def test_reasons(case: Problem, platform: str, reasons: list[str]) -> None:
    assert list(Matmul().why_not(case, Platform.parse(platform))) == reasons
