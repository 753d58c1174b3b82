"""The kernels compile for sm_90 without a GPU, with no register spilled, through the launches that `run` makes."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")
sys.path.insert(0, str(Path(__file__).parent))

from aot import compile_for_hopper
from blockscale.formats import get_format
from blockscale.kernels.gluon import gemm, quantize, swap, tables, wide
from blockscale.kernels.gluon.config import Config, Wide, parse
from blockscale.kernels.gluon.launch import Launch
from blockscale.kernels.gluon.selection import by_rule
from blockscale.reference import quantize as quantize_tensor
from blockscale.tensor import BlockScaled

BF16 = torch.bfloat16


def launch(config: Config, m: int, n: int, k: int, out: torch.dtype = BF16, e8m0: bool = False) -> Launch:
    x, w = (torch.zeros(rows, k, dtype=torch.float8_e4m3fn) for rows in (m, n))
    x_scale = torch.ones(-(-k // 128), -(-m // 4) * 4)
    w_scale = torch.ones(-(-n // 128), -(-k // 128), dtype=torch.uint8 if e8m0 else torch.float32)
    operands = (x, x_scale, w, w_scale, torch.zeros(n, dtype=out), torch.empty(m, n, dtype=out))
    if isinstance(config, Wide):
        return wide.launch(*operands, config, 132)
    return swap.launch(*operands, config, 132)


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


def _chosen() -> list[tuple[str, tuple[int, int, int]]]:
    """Every configuration of the table, and what the rule gives other shapes, each with one shape that gets it."""
    found = {}
    for path in Path(tables.__file__).parent.glob("*.json"):
        for key, rows in tables.read(path.stem).items():
            n, k = map(int, key.split("x"))
            found |= {text: (int(m), n, k) for m, text in rows.items()}
    for n, k in ((576, 7168), (5120, 3072), (3584, 4608), (2048, 5120), (24576, 1536), (32768, 512)):
        found |= {str(by_rule(m, n, k, 132)): (m, n, k) for m in (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)}
    return sorted(found.items())


@pytest.mark.slow
@pytest.mark.parametrize(("text", "shape"), _chosen())
def test_everything_that_may_be_chosen_compiles(text: str, shape: tuple[int, int, int]) -> None:
    assert compile_for_hopper(launch(parse(text), *shape)).metadata.shared <= 232448
