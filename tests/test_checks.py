"""Operands that no kernel may see: it would read past their end, or take one dtype for another."""

import pytest
import torch

import blockscale
from blockscale import BlockscaleError, DtypeError, ShapeError, UnknownNameError, conformance, nn

X = torch.ones(4, 256)
W = blockscale.quantize(torch.ones(2, 64, 256), "fp8_128x128", kernel="reference")
ENDS = torch.tensor([1, 4], dtype=torch.int32)
PLAIN = torch.ones(64, 256)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: blockscale.linear(X, PLAIN), DtypeError, "linear: w needs a BlockScaled .* got Tensor"),
        (lambda: blockscale.matmul(X, W[0]), DtypeError, "matmul: x needs a BlockScaled .* got Tensor"),
        (lambda: blockscale.dequantize(PLAIN), DtypeError, "dequantize: q needs a BlockScaled"),
        (lambda: blockscale.dequantize(W, torch.int8), DtypeError, "dequantize: needs float32.* got torch.int8"),
        (lambda: blockscale.grouped_linear(X[0], W, ENDS), ShapeError, r"needs x \[T, K\], .* got \[256\], "),
        (lambda: blockscale.grouped_linear(X[None], W, ENDS), ShapeError, r"got \[1, 4, 256\], "),
        (lambda: blockscale.grouped_linear(X, W, ENDS[:1]), ShapeError, r"\[2, 64, 256\] and \[1\]"),
        (lambda: blockscale.grouped_linear(X, W, ENDS.float()), DtypeError, "offsets needs int32, got torch.float32"),
        (lambda: blockscale.grouped_linear(X, W, ENDS.to("meta")), DtypeError, "x is on cpu, offsets on meta"),
        (
            lambda: blockscale.masked_linear(X.view(2, 2, 256), W, ENDS.double()),
            DtypeError,
            "masked_linear: counts needs",
        ),
        (
            lambda: blockscale.masked_linear(X.int().view(2, 2, 256), W, ENDS),
            DtypeError,
            "masked_linear: x needs float",
        ),
        (lambda: blockscale.dense_linear(X, PLAIN[0]), ShapeError, r"weight \[N, K\], got \[4, 256\] and \[256\]"),
        (
            lambda: blockscale.dense_linear(X[0, 0], PLAIN),
            ShapeError,
            r"needs x \[..., K\].* got \[\] and \[64",
        ),
        (lambda: blockscale.quantize(X, None), UnknownNameError, "unknown format 'None'"),
        (lambda: blockscale.unregister(object()), BlockscaleError, "unregister: needs a kernel that"),
        (lambda: conformance.run(ops=["linaer"]), UnknownNameError, "unknown op 'linaer'; did you mean"),
    ],
)
def test_a_function_says_what_it_got_and_needs(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("x", "ends", "error"),
    [
        (X[0], ENDS, ShapeError),
        (X, ENDS[:1], ShapeError),
        (X[:, :128], ENDS, ShapeError),
        (X, ENDS.float(), DtypeError),
    ],
)
def test_a_module_asks_too(x, ends, error):
    """A kernel that is handed fewer offsets than experts reads what lies behind them."""
    with pytest.raises(error, match="grouped_linear"):
        nn.StackedLinear(W)(x, ends)
