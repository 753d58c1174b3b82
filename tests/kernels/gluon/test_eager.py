"""What a prepared call allocates, with launches that do nothing."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from blockscale.kernels.gluon.eager import Prepared


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [16, 13])
def test_the_result_has_the_dtype_that_the_kernel_writes(out, n):
    """Partial sums of bf16 x are fp32: a result in x's dtype would be half as long as what is written."""
    call = object.__new__(Prepared)
    call.problem = SimpleNamespace(n=n, out_dtype=out)
    call.y_shape, call.kept, call.y_map = (3, 16), object(), None
    call.x_address, call.y_address = SimpleNamespace(value=0), SimpleNamespace(value=0)
    call.quantize = call.multiply = SimpleNamespace(enqueue=lambda: 0)
    y = call(torch.zeros(3, 128, dtype=torch.bfloat16), None)
    assert (y.dtype, tuple(y.shape)) == (out, (3, n))
    assert call.y_address.value
