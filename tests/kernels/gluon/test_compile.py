"""The kernels compile for sm_90 without a GPU, with no register spilled, through the launches that `run` makes."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")
sys.path.insert(0, str(Path(__file__).parent))

from aot import chosen, compile_for_hopper, launch
from blockscale.formats import get_format
from blockscale.kernels.gluon import gemm, quantize
from blockscale.kernels.gluon.config import parse
from blockscale.reference import quantize as quantize_tensor
from blockscale.tensor import BlockScaled

BF16 = torch.bfloat16


def quantized(rows: int, k: int, fmt: str) -> BlockScaled:
    return quantize_tensor(torch.ones(rows, k), get_format(fmt))


@pytest.mark.parametrize(
    ("text", "shape", "out", "e8m0"),
    [
        ("swap-16-g2-k2-x1-s2", (16, 576, 2048), BF16, True),
        ("wide-64o-u4-p2-g2-s1-x1-y64", (130, 576, 1024), torch.float32, False),
        ("wide-256l-u4-p1-g2-s1-x1-y128", (300, 34176, 1024), BF16, False),  # several waves
        ("wide-128t-u4-p3-g1-s1-x2-y64", (64, 576, 1024), BF16, False),
    ],
)
def test_it_compiles_to_fp8_wgmma(text: str, shape: tuple[int, int, int], out: torch.dtype, e8m0: bool) -> None:
    compiled = compile_for_hopper(launch(parse(text), *shape, out, e8m0))
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert ".f32.e4m3.e4m3" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 232448


def test_the_quantizer_compiles_to_saturating_fp8_casts() -> None:
    data, scale = torch.empty(5, 320, dtype=torch.float8_e4m3fn), torch.empty(3, 8)
    compiled = compile_for_hopper(quantize.launch(torch.zeros(5, 320, dtype=BF16), data, scale, True, 1e-10))
    assert "cvt.rn.satfinite.e4m3x2" in compiled.asm["ptx"]


def test_a_launch_refuses_a_split_larger_than_k() -> None:
    x, w = quantized(9, 512, "fp8_1x128"), quantized(192, 512, "fp8_128x128")
    y = torch.empty(9, 192, dtype=BF16)
    with pytest.raises(ValueError, match=r"launch: K=512 has 2 steps, swap-16-g1-k6-x2-s2 needs 6 or more"):
        gemm.launch(gemm.tma_scales(x), w, None, y, parse("swap-16-g1-k6-x2-s2"), 132)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "shape"), chosen())
def test_everything_that_may_be_chosen_compiles(text: str, shape: tuple[int, int, int]) -> None:
    assert compile_for_hopper(launch(parse(text), *shape)).metadata.shared <= 232448
