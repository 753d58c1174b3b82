"""Which tiles operands get that 16 bits hold with their scales, and what `explain` says of them."""

import pytest
import torch

from blockscale.formats import get_format
from blockscale.kernels.triton import exact
from blockscale.numerics import get_numerics
from blockscale.platform import Platform
from blockscale.registry import Problem, select

OTHERS = ("cuda:sm_75", "cuda:sm_80", "cuda:sm_89", "cuda:sm_100", "cuda:sm_120", "rocm:gfx942", "xpu:bmg")


def problem(name, numerics="checkpoint"):
    return Problem("linear", 4096, 7168, torch.bfloat16, get_format(name), numerics=get_numerics(numerics))


FOLDED = [  # m, n, k -> tile and slices of K of weights decoded in registers; what was fastest of those timed, or near
    (17, 2048, 7168, (32, 64, 128, 8)), (32, 7168, 2048, (32, 64, 128, 2)), (64, 2048, 7168, (64, 64, 128, 8)),
    (64, 18432, 7168, (64, 128, 64, 2)), (128, 7168, 2048, (128, 64, 128, 2)), (128, 18432, 7168, (128, 64, 128, 2)),
    (256, 2048, 7168, (128, 64, 64, 4)), (256, 7168, 2048, (128, 64, 64, 1)), (256, 18432, 7168, (128, 128, 64, 2)),
    (512, 2048, 7168, (256, 128, 64, 4)), (512, 7168, 2048, (256, 128, 64, 1)), (512, 64, 128, (256, 128, 64, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("m", "n", "k", "want"), FOLDED)
def test_tiles_of_weights_decoded_in_registers(m, n, k, want):
    tile = exact.folded_tile(m, n, k, Platform.parse("cuda:sm_90+sms=132"))
    assert (tile.bm, tile.bn, tile.bk, tile.split) == want
    assert tile.swap
    assert tile.entry.startswith("gemm exact: measured, sm_90/folded, M <= ")


def test_activations_are_shuffled_where_registers_hold_weights():
    hopper = Platform.parse("cuda:sm_90")
    asked = [(16, 512, 32), (17, 512, 32), (512, 528, 32), (64, 512, 128), (64, 512, None), (4096, 512, 16)]
    assert [exact.shuffles(m, k, group, hopper) for m, k, group in asked] == [False, True, False, False, False, True]
    assert not any(exact.shuffles(64, 512, 32, Platform.parse(chip)) for chip in OTHERS)


DENSE = [  # m, n, k, rows of a block -> rows decoded at a time, tile
    (4096, 2048, 7168, 32, 2048, (256, 128)), (1024, 2048, 7168, 32, 2048, (128, 128)),
    (4096, 18432, 7168, 32, 4096, (256, 128)),  # full waves; 64 MiB
    (4096, 18432, 7168, 48, 4224, (256, 128)), (600, 130, 256, 1, 256, (128, 128)),
]  # fmt: skip


@pytest.mark.parametrize(("m", "n", "k", "block", "rows", "want"), DENSE)
def test_slices_and_tiles_of_weights_decoded_with_their_scales(m, n, k, block, rows, want):
    planned, tile = exact.dense_plan(m, n, k, block, Platform.parse("cuda:sm_90+sms=132"))
    assert (planned, (tile.bm, tile.bn)) == (rows, want)


def test_explain_says_what_exact_operands_become():
    asked = problem("fp8_32x32_ue8m0", "deepseek_v4_1")
    hopper = Platform.parse("cuda:sm_90+triton=3.6")
    lines = list(select(asked, hopper).pick(1).configurations(asked, hopper))
    assert lines[0] == (
        "bfloat16 holds codes times scales of fp8_1x32_ue8m0 and fp8_32x32_ue8m0: multiplied as such, fp32 sums, "
        "nothing promoted"
    )
    assert [line.split(":")[0] for line in lines[1:]] == [f"M={m}" for m in (1, 16, 64, 256, 512, 1024, 4096)]
    assert "weights decoded in registers" in lines[3]
    assert "weights decoded before, 4096 rows at a time" in lines[-1]
    kernel = select(problem("fp8_128x128"), Platform.parse("cuda:sm_80+triton=3.6")).pick(1)
    assert list(kernel.configurations(problem("fp8_128x128"), Platform.parse("cuda:sm_80"))) == []
    fine = problem("mxfp8", "checkpoint,act_floor=1e-35")
    assert list(kernel.configurations(fine, Platform.parse("cuda:sm_80"))) == []
