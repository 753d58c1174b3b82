"""Operands that do not fit an operation, and operands of nothing."""

import pytest
import torch

import blockscale
from blockscale import (
    BlockscaleError,
    DtypeError,
    ScaleError,
    ShapeError,
    UnknownNameError,
    checks,
    get_format,
    nn,
    reference,
)

ENDS = torch.tensor([2, 4], dtype=torch.int32)


def quantized(x):
    return blockscale.quantize(x, "fp8_1x128")


MISTAKES = {
    "stack": (lambda x, w, ws: blockscale.linear(x, ws), ShapeError, r"needs w \[N, K\], got \[2, 192, 576\]"),
    "stack, matmul": (lambda x, w, ws: blockscale.matmul(quantized(x), ws), ShapeError, r"matmul: needs w \[N"),
    "stack of x, matmul": (
        lambda x, w, ws: blockscale.matmul(quantized(x.view(2, 2, 576)), w),
        ShapeError,
        r"matmul: needs x \[M, K\], got \[2, 2, 576\]",
    ),
    "bias": (lambda x, w, ws: blockscale.linear(x, w, torch.zeros(192).double()), DtypeError, "bias .*float64"),
    "offsets": (lambda x, w, ws: blockscale.grouped_linear(x, ws, ENDS.float()), DtypeError, "offsets needs int32"),
    "counts": (lambda x, w, ws: blockscale.masked_linear(x.view(2, 2, 576), ws, ENDS / 2), DtypeError, "counts"),
    "ids": (lambda x, w, ws: blockscale.gathered_linear(x, ws, x[:, :2]), DtypeError, "ids needs int32"),
    "rounding": (lambda x, w, ws: blockscale.quantize(x, "fp8_row", scale_rounding="up"), UnknownNameError, "'up'"),
    "fp32 in E8M0": (
        lambda x, w, ws: blockscale.quantize(x, "mxfp8", scale_rounding="none"),
        ScaleError,
        "mxfp8: its scales are powers of two",
    ),
    "fp32 in E8M0, fused": (
        lambda x, w, ws: blockscale.swiglu_quantize(x, "fp8_1x32_ue8m0", scale_rounding="none"),
        ScaleError,
        "got 'none'",
    ),
    "rounding of two levels": (
        lambda x, w, ws: blockscale.quantize(x, "nvfp4", scale_rounding="pow2_ceil"),
        BlockscaleError,
        "nvfp4: .*got scale_rounding='pow2_ceil'",
    ),
    "floor of two levels": (
        lambda x, w, ws: blockscale.quantize(x, "nvfp4", floor=1e-4),
        BlockscaleError,
        "nvfp4: .*got floor=0.0001",
    ),
    "floor": (lambda x, w, ws: blockscale.quantize(x, "fp8_row", floor=-1.0), BlockscaleError, "needs a positive"),
    "dense bias": (
        lambda x, w, ws: blockscale.dense_linear(x, torch.ones(8, 576), torch.ones(7)),
        ShapeError,
        r"dense_linear: w \[8, 576\] needs bias \[8\], got \[7\]",
    ),
    "weights": (
        lambda x, w, ws: blockscale.swiglu_quantize(x, "fp8_row", routing_weight=torch.ones(3)),
        ShapeError,
        r"gate_up \[4, 576\] needs routing_weight \[4\], got \[3\]",
    ),
}


@pytest.fixture
def w():
    return blockscale.quantize(torch.randn(192, 576), "fp8_128x128")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_operands_that_do_not_fit_are_said_to_be_so(w, mistake):
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call(torch.randn(4, 576), w, blockscale.quantize(torch.randn(2, 192, 576), "fp8_128x128"))


@pytest.mark.parametrize("x", [torch.randn(4, 576), torch.randn(4, 576, requires_grad=True)])
def test_modules_check_what_the_functions_check(w, x):
    """Also where a gradient is asked for, which takes another way: a kernel would read another device's memory."""
    with pytest.raises(DtypeError, match="x is on cpu, the weight on meta"):
        nn.Linear(w.to("meta"))(x)
    stack = blockscale.quantize(torch.randn(2, 192, 576), "fp8_128x128").to("meta")
    with pytest.raises(DtypeError, match="x is on cpu, the weight on meta"):
        nn.StackedLinear(stack)(x, ENDS)
    with pytest.raises(DtypeError, match="bias needs float32, bfloat16 or float16, got torch.float64"):
        nn.Linear(w, torch.zeros(192)).double()(x)


def test_end_rows_beyond_32_bits_are_no_small_ones():
    w, x = blockscale.quantize(torch.randn(2, 64, 128), "fp8_128x128"), torch.randn(4, 128)
    far = torch.tensor([2, 2**32 + 3])
    assert torch.equal(blockscale.grouped_linear(x, w, far), blockscale.grouped_linear(x, w, ENDS))
    counts, buffers = torch.tensor([2**32, 1]), x.view(2, 2, 128)
    assert torch.equal(
        blockscale.masked_linear(buffers, w, counts), blockscale.masked_linear(buffers, w, torch.tensor([2, 1]))
    )


NOTHING = torch.empty(0, 576)
OF_NOTHING = {
    "linear": (lambda w, ws: blockscale.linear(NOTHING, w), (0, 192)),
    "dense_linear": (lambda w, ws: blockscale.dense_linear(NOTHING, torch.randn(8, 576)), (0, 8)),
    "matmul": (lambda w, ws: blockscale.matmul(quantized(NOTHING), w), (0, 192)),
    "grouped_linear": (lambda w, ws: blockscale.grouped_linear(NOTHING, ws, ENDS * 0), (0, 192)),
    "masked_linear": (lambda w, ws: blockscale.masked_linear(NOTHING.view(2, 0, 576), ws, ENDS * 0), (2, 0, 192)),
    "gathered_linear": (lambda w, ws: blockscale.gathered_linear(NOTHING, ws, NOTHING[:, :2].int()), (0, 2, 192)),
    "swiglu_quantize": (lambda w, ws: blockscale.swiglu_quantize(NOTHING, "fp8_1x128"), (0, 288)),
    "rmsnorm_quantize": (
        lambda w, ws: blockscale.rmsnorm_quantize(NOTHING, torch.ones(576), 1e-6, "fp8_row"),
        (0, 576),
    ),
}


@pytest.mark.parametrize("op", OF_NOTHING)
def test_no_rows_give_no_rows(w, op):
    call, shape = OF_NOTHING[op]
    assert tuple(call(w, blockscale.quantize(torch.randn(2, 192, 576), "fp8_128x128")).shape) == shape


@pytest.mark.parametrize("name", ["fp8_128x128", "fp8_tensor", "fp8_row", "mxfp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("quantize", [blockscale.quantize, lambda x, name: reference.quantize(x, get_format(name))])
def test_no_rows_are_quantized(name, quantize):
    q = quantize(NOTHING, name)
    assert q.shape == (0, 576)
    assert q.scale.shape == q.format.scale_shape(0, 576)
    assert tuple(blockscale.dequantize(q).shape) == (0, 576)


@pytest.mark.parametrize("name", ["fp8_1x128", "mxfp4", "nvfp4"])
def test_quantize_has_a_fake_for_every_format(name):
    x = torch.randn(4, 576)
    run = torch.compile(lambda x: blockscale.quantize(x, name).scale, fullgraph=True, backend="eager")
    assert torch.equal(run(x).view(torch.uint8), blockscale.quantize(x, name).scale.view(torch.uint8))


X, STACK = torch.randn(4, 576), blockscale.quantize(torch.randn(2, 192, 576), "fp8_128x128")
EXPERTS = {
    "grouped_linear": (X, ENDS),
    "masked_linear": (X.view(2, 2, 576), ENDS // 2),
    "gathered_linear": (X, ENDS.new_zeros(4, 2)),
}


@pytest.mark.parametrize("call", [*EXPERTS, "module"])
def test_experts_ask_their_operands_once(call, monkeypatch):
    asked, where = [], checks.where
    monkeypatch.setattr(checks, "where", lambda op, x, rows: (asked.append(op), where(op, x, rows)))
    if call == "module":
        blockscale.nn.StackedLinear(STACK)(X, ENDS)
    else:
        x, rows = EXPERTS[call]
        getattr(blockscale, call)(x, STACK, rows)
    assert asked == ["grouped_linear" if call == "module" else call]


@pytest.mark.parametrize("op", EXPERTS)
def test_an_op_that_is_called_by_itself_asks_too(op):
    """A kernel would read past the end of x, or take floats for rows."""
    x, rows = EXPERTS[op]
    run = getattr(torch.ops.blockscale, op)
    how = (192, 576, "fp8_128x128", "row", "checkpoint", "")
    run(x, STACK.data, STACK.scale, None, None, rows, *how)
    with pytest.raises(ShapeError, match=rf"{op}: needs x .*, got .*575\]"):
        run(x[..., 1:], STACK.data, STACK.scale, None, None, rows, *how)
    with pytest.raises(DtypeError, match="needs int32, got torch.float32"):
        run(x, STACK.data, STACK.scale, None, None, rows.float(), *how)


def test_a_module_asks_where_no_op_runs():
    with pytest.raises(ShapeError, match=r"needs x \[T, K\], w \[E, N, K\] and offsets \[E\], got \[4, 575\]"):
        blockscale.nn.StackedLinear(STACK).to("meta")(torch.empty(4, 575, device="meta"), ENDS.to("meta"))
