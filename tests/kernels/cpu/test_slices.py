"""`cpu.slices` against the fp64 definition: every FP8 format, ragged edges, NaN codes, extreme scales."""

from __future__ import annotations

import pytest
import torch

from blockscale import reference
from blockscale.formats import get_format
from blockscale.kernels.cpu import slices
from blockscale.numerics import get_numerics
from blockscale.tensor import BlockScaled

FORMATS = (
    "fp8_128x128", "fp8_32x32_ue8m0", "fp8_1x128", "fp8_row", "fp8_tensor", "mxfp8",
    "fp8e5m2_128x128", "fp8fnuz_128x128",
)  # fmt: skip
WEIGHT_ONLY = get_numerics("weight_only")


def worst_row(y: torch.Tensor, want: torch.Tensor) -> float:
    """Largest relative error of a row: a norm over everything would pass with whole rows wrong."""
    return ((y.double() - want).norm(dim=1) / want.norm(dim=1)).max().item()


@pytest.mark.parametrize("numerics", ["checkpoint", "weight_only"])
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_definition_on_ragged_shapes(name: str, numerics: str) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(5, 583), torch.randn(200)
    w = reference.quantize(torch.randn(200, 583), get_format(name))
    y = slices.linear(x, w, bias, get_numerics(numerics), torch.float32)
    want = reference.linear(x.double(), w, bias, numerics=get_numerics(numerics))
    assert worst_row(y, want) < 1e-6


def test_cuts_a_weight_into_slices_that_end_inside_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(slices, "SLICE_ELEMENTS", 300 * 48)
    x, w = torch.randn(3, 300), reference.quantize(torch.randn(200, 300), get_format("fp8_128x128"))
    y = slices.linear(x, w, None, WEIGHT_ONLY, torch.float32)
    assert worst_row(y, reference.linear(x.double(), w, numerics=WEIGHT_ONLY)) < 1e-6


@pytest.mark.parametrize("name", ["fp8_128x128", "fp8e5m2_128x128", "fp8fnuz_128x128"])
def test_decodes_every_byte(name: str) -> None:
    fmt = get_format(name)
    data = torch.arange(256, dtype=torch.uint8).view(1, 256).view(fmt.element.dtype)
    w = BlockScaled(data.mT.contiguous(), torch.ones(2, 1), fmt)
    y = slices.linear(torch.ones(1, 1), w, None, WEIGHT_ONLY, torch.float32)
    torch.testing.assert_close(y, data.float(), rtol=0, atol=0, equal_nan=True)


def test_a_scale_near_the_top_of_fp32_does_not_overflow() -> None:
    w = BlockScaled(
        torch.full((1, 128), 0.5).to(torch.float8_e4m3fn), torch.full((1, 1), 2.0**127), get_format("fp8_128x128")
    )
    y = slices.linear(torch.full((1, 128), 2.0**-7), w, None, WEIGHT_ONLY, torch.float32)
    assert y.item() == 2.0**126


def test_fp8_subnormals_survive_flush_denormal() -> None:
    w = BlockScaled(torch.full((1, 128), 2.0**-9).to(torch.float8_e4m3fn), torch.ones(1, 1), get_format("fp8_128x128"))
    assert torch.set_flush_denormal(True)
    try:
        y = slices.linear(torch.ones(1, 128), w, None, WEIGHT_ONLY, torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert y.item() == 0.25
