"""Straight-through gradients: adapters train beside frozen stored bytes."""

import copy

import pytest
import torch
from torch.autograd import forward_ad

import blockscale
from blockscale import BlockscaleError
from blockscale.nn import DenseLinear, Linear


def test_gradient_of_x_is_the_gradient_through_the_dequantized_weight():
    w = blockscale.quantize(torch.randn(192, 576), "fp8_128x128")
    x = torch.randn(2, 3, 576, requires_grad=True)
    grad = torch.randn(2, 3, 192)
    blockscale.linear(x, w).backward(grad)
    torch.testing.assert_close(x.grad, grad @ blockscale.dequantize(w))


def test_gradient_of_bias():
    w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128")
    bias = torch.zeros(64, requires_grad=True)
    blockscale.linear(torch.randn(5, 128), w, bias).sum().backward()
    assert bias.grad.tolist() == [5.0] * 64


def test_experts():
    w = blockscale.quantize(torch.randn(3, 64, 128), "fp8_128x128")
    x = torch.randn(5, 128, requires_grad=True)
    grad = torch.randn(5, 64)
    blockscale.grouped_linear(x, w, torch.tensor([2, 2, 4], dtype=torch.int32)).backward(grad)
    torch.testing.assert_close(x.grad[:2], grad[:2] @ blockscale.dequantize(w[0]))
    torch.testing.assert_close(x.grad[2:4], grad[2:4] @ blockscale.dequantize(w[2]))
    assert not x.grad[4].any()


def test_torch_func_has_the_gradients_of_backward():
    w = blockscale.quantize(torch.randn(2, 64, 128), "fp8_128x128")
    x, ends, grad = torch.randn(5, 128), torch.tensor([2, 4], dtype=torch.int32), torch.randn(5, 64)
    dense, dense_w = torch.func.vjp(lambda x: blockscale.linear(x, w[0]), x)[1](grad)[0], blockscale.dequantize(w[0])
    torch.testing.assert_close(dense, grad @ dense_w)
    experts = torch.func.vjp(lambda x: blockscale.grouped_linear(x, w, ends), x)[1](grad)[0]
    torch.testing.assert_close(experts[:2], grad[:2] @ dense_w)
    assert not experts[4].any()


W = blockscale.quantize(torch.ones(2, 64, 128), "fp8_128x128", kernel="reference")
ENDS = torch.tensor([2, 4], dtype=torch.int32)
FORWARD = {
    "linear": lambda x: blockscale.linear(x, W[0]),
    "grouped_linear": lambda x: blockscale.grouped_linear(x, W, ENDS),
    "masked_linear": lambda x: blockscale.masked_linear(x.view(2, 2, 128), W, ENDS // 2),
    "gathered_linear": lambda x: blockscale.gathered_linear(x, W, ENDS.new_zeros(4, 1)),
    "dense_linear": lambda x: blockscale.dense_linear(x, torch.ones(8, 128)),
    "a module": Linear(W[0]),
}


@pytest.mark.parametrize("op", FORWARD)
def test_forward_mode_refuses_instead_of_tangents_of_zero(op):
    run, x = FORWARD[op], torch.randn(4, 128)
    run(x)  # warm: the shortcut that a second call takes must notice too
    with pytest.raises(BlockscaleError, match="no forward-mode derivative"):
        torch.func.jvp(run, (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(BlockscaleError, match="no forward-mode derivative"):
            run(forward_ad.make_dual(x, x))
        assert forward_ad.unpack_dual(run(x)).tangent is None  # no tangent asked for, none refused


def test_an_unquantized_layer_has_both():
    layer, x = DenseLinear(128, 8), torch.randn(4, 128)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.bias.grad.tolist() == [4.0] * 8
    tangent = torch.func.jvp(layer.requires_grad_(False), (x,), (x,))[1]
    torch.testing.assert_close(tangent, x @ layer.weight.T)
    with pytest.raises(BlockscaleError, match="dense_linear has no gradient"):
        blockscale.dense_linear(x, layer.weight, layer.bias.requires_grad_())


def test_a_parameter_is_quantized_as_it_stands():
    """Its scales must not ask for a gradient, which no call with the weight could give."""
    layer = torch.nn.Linear(128, 64)
    w = blockscale.quantize(layer.weight, "fp8_128x128")
    norm = torch.nn.RMSNorm(128)
    made = (
        w,
        blockscale.rmsnorm_quantize(torch.randn(2, 128), norm.weight, 1e-6, "fp8_1x128"),
        blockscale.swiglu_quantize(layer.weight, "fp8_1x64", routing_weight=torch.ones(64, requires_grad=True)),
    )
    assert not any(t.requires_grad for q in made for t in (q.data, q.scale))
    x = torch.randn(3, 128, requires_grad=True)
    copy.deepcopy(Linear(w))(x).sum().backward()
    torch.testing.assert_close(x.grad, blockscale.dequantize(w).sum(0).expand(3, -1))


def test_weight_gradients_refuse():
    w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128")
    w.scale.requires_grad_()
    with pytest.raises(BlockscaleError, match="no gradient"):
        blockscale.linear(torch.randn(2, 128, requires_grad=True), w)


def test_inference_builds_no_graph():
    w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128")
    with torch.no_grad():
        assert not blockscale.linear(torch.randn(2, 128, requires_grad=True), w).requires_grad
    with torch.inference_mode():
        assert blockscale.linear(torch.randn(2, 128), w).shape == (2, 64)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_learns_beside_a_frozen_layer(compiled):
    base = Linear(blockscale.quantize(torch.randn(32, 64), "fp8_32x32_ue8m0"))
    first, second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)
    run = lambda x: base(first(x)) + second(x)  # noqa: E731
    run = torch.compile(run, fullgraph=True) if compiled else run
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=1e-2)
    x, target = torch.randn(16, 64), torch.randn(16, 32)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (run(x) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("grouped", [False, True])
def test_second_derivatives_are_those_of_the_dequantized_weight(grouped):
    w = blockscale.quantize(torch.randn(2, 64, 128), "fp8_128x128")
    ends, dense = torch.tensor([2, 4], dtype=torch.int32), blockscale.dequantize(w)
    x = torch.randn(4, 128, requires_grad=True)
    y = blockscale.grouped_linear(x, w, ends) if grouped else blockscale.linear(x, w[0])
    (first,) = torch.autograd.grad((y**3).sum() / 3, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    for row, expert in enumerate((0, 0, 1, 1) if grouped else (0, 0, 0, 0)):
        curvature = 2 * y[row].detach() * dense[expert].sum(-1)
        torch.testing.assert_close(second[row], curvature @ dense[expert], rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*batching rule")  # torch's word for one call a row
def test_gradients_of_each_row_apart():
    w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128")
    x = torch.randn(3, 128)
    got = torch.func.vmap(torch.func.grad(lambda row: blockscale.linear(row, w).sum()))(x)
    torch.testing.assert_close(got, blockscale.dequantize(w).sum(0).expand(3, -1))
