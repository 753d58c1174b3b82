"""What a container refuses to hold: kernels read its parts without another look."""

from dataclasses import replace

import pytest
import torch

import blockscale
from blockscale import DtypeError, ShapeError

FP8 = blockscale.quantize(torch.randn(4, 64, 128), "fp8_128x128")
FP4 = blockscale.quantize(torch.randn(4, 64, 128), "nvfp4")


@pytest.mark.parametrize(
    ("q", "part", "value", "error", "says"),
    [
        (FP4, "global_scale", torch.ones(2), ShapeError, r"needs global_scale \[\] or \[4\], got \[2\]"),
        (FP4, "global_scale", torch.ones(4, 1), ShapeError, r"got \[4, 1\]"),
        (FP4, "input_scale", torch.ones(2), ShapeError, r"needs input_scale \[\] or \[4\], got \[2\]"),
        (FP8, "input_scale", torch.ones(128), ShapeError, r"needs input_scale \[\] or \[4\], got \[128\]"),
        (FP4, "global_scale", torch.tensor(1), DtypeError, "global_scale needs float32, got torch.int64"),
        (FP4, "global_scale", None, ShapeError, "nvfp4: needs a global_scale, got none"),
        (FP8, "global_scale", torch.tensor(2.0), ShapeError, "fp8_128x128: needs no global_scale, got one"),
    ],
)
def test_second_level_scales_that_do_not_fit(q, part, value, error, says):
    with pytest.raises(error, match=says):
        replace(q, **{part: value})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_is_one_number_however_it_is_shaped(shape):
    x, ends = torch.randn(8, 128), torch.tensor([2, 4, 6, 8], dtype=torch.int32)
    want = blockscale.grouped_linear(x, replace(FP4, input_scale=torch.tensor(0.01)), ends)
    w = replace(FP4, input_scale=torch.full(shape, 0.01))
    assert torch.equal(blockscale.grouped_linear(x, w, ends), want)
    assert torch.equal(blockscale.linear(x[2:4], w[1]), want[2:4])
