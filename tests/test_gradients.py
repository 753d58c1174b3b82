"""Straight-through gradients: adapters train beside frozen stored bytes."""

import pytest
import torch

import blockscale
from blockscale import BlockscaleError
from blockscale.nn import Linear


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
