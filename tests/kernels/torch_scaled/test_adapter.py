"""What scaled_mm is handed: strides, padding and scales, with a stand-in that computes by the definition."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blockscale import reference
from blockscale.formats import get_format
from blockscale.kernels.torch_scaled import Linear, Matmul
from blockscale.platform import Platform
from blockscale.registry import Problem
from blockscale.tensor import BlockScaled

BF16 = torch.bfloat16
HOPPER = "cuda:sm_90+torch=2.11+cuda=13.0"


def linear(n: int = 192, k: int = 512, format: str = "fp8_128x128", **changes: object) -> Problem:
    return replace(Problem("linear", n, k, BF16, get_format(format)), **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def scaled_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(a: Tensor, b: Tensor, sa: Tensor, ra: Any, sb: Tensor, rb: Any, *swizzles: Any, bias: Tensor | None,
                 output_dtype: torch.dtype) -> Tensor:  # fmt: skip
        m, k = a.shape
        assert m % 4 == 0
        assert sa.shape == (m, k // 128)
        assert sa.stride() == (1, m)
        assert (ra.name, rb.name) == ("BlockWise1x128", "BlockWise128x128")
        assert sb.shape[0] == k // 128
        assert sb.stride(0) == 1
        x = BlockScaled(a.contiguous(), sa.contiguous(), get_format("fp8_1x128"))
        w = BlockScaled(b.mT.contiguous(), sb.mT.contiguous(), get_format("fp8_128x128"))
        y = reference.matmul(x, w, torch.float64)
        return (y if bias is None else y + bias).to(output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", stand_in)


@pytest.mark.parametrize("format", ["fp8_128x128", "fp8_128x128_ue8m0"])
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_linear(rows: int, format: str) -> None:
    x, bias = torch.randn(rows, 512).to(BF16), torch.randn(192).to(BF16)
    w = reference.quantize(torch.randn(192, 512), get_format(format))
    case = linear(format=format)
    want = reference.linear(x, w, bias, numerics=case.numerics)
    assert torch.equal(Linear().run(case, x, w, bias), want)


@pytest.mark.parametrize("rows", [3, 8])
def test_matmul(rows: int) -> None:
    x = reference.quantize(torch.randn(rows, 512), get_format("fp8_1x128"))
    w = reference.quantize(torch.randn(192, 512), get_format("fp8_128x128"))
    case = linear(op="matmul", x_format=x.format, x_dtype=x.data.dtype)
    assert torch.equal(Matmul().run(case, x, w), reference.matmul(x, w, BF16))


@pytest.mark.parametrize(
    ("case", "platform", "reasons"),
    [
        (linear(), HOPPER, []),
        (linear(), "cuda:sm_90+torch=2.9+cuda=12.8", [
            "needs CUDA 12.9 or newer, got 12.8", "needs torch 2.10 or newer for scaled_mm, got 2.9"]),
        (linear(n=100, k=576), HOPPER, [
            "K=576 is not a multiple of 512: rows of weight scales start at multiples of 16 bytes",
            "N=100 is not a multiple of 16"]),
        (linear(), "cuda:sm_100+torch=2.11+cuda=13.0", [
            "cuBLASLt multiplies 128x128 blocks on sm_90 only, not on sm_100"]),
    ],
)  # fmt: skip
def test_reasons(case: Problem, platform: str, reasons: list[str]) -> None:
    assert list(Linear().why_not(case, Platform.parse(platform))) == reasons
