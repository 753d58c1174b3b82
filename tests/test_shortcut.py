"""A warm `linear` goes straight to its kernel, and nobody can tell but by the clock."""

import copy
import io
import warnings

import pytest
import torch

import blockscale
from blockscale import nn, observe, registry
from blockscale.kernels.reference import Linear


@pytest.fixture
def w():
    return blockscale.quantize(torch.randn(192, 576), "fp8_128x128")


@pytest.fixture
def x():
    return torch.randn(3, 576)


class Doubled(Linear):
    name, priority = "doubled.linear", 10_000

    def run(self, problem, x, w, bias):
        return 2 * super().run(problem, x, w, bias)


@pytest.fixture
def doubled():
    kernel = Doubled()
    yield lambda: registry.register(kernel)
    registry.unregister(kernel)


def saved_and_loaded(held):
    file = io.BytesIO()
    torch.save(held, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("shape", [(576,), (1, 576), (5, 576), (2, 3, 576), (2, 0, 576), (0, 576), (2, 1, 2, 576)])
def test_second_calls_give_what_first_calls_give(w, shape):
    x, bias = torch.randn(shape), torch.randn(192)
    plain, biased = blockscale.linear(x, w), blockscale.linear(x, w, bias)
    assert w.bound is not None
    assert torch.equal(blockscale.linear(x, w), plain)
    assert torch.equal(blockscale.linear(x, w, bias), biased)
    assert plain.shape == (*shape[:-1], 192)
    assert torch.equal(blockscale.linear(x, copy.copy(w)), plain)


def test_a_call_that_differs_is_asked_anew(w, x):
    blockscale.linear(x, w)
    first = w.bound
    assert blockscale.linear(x.to(torch.bfloat16), w).dtype == torch.bfloat16
    assert w.bound is not first
    exact = blockscale.linear(x, w, numerics="weight_only")
    assert torch.equal(exact, blockscale.linear(x, copy.copy(w), numerics="weight_only"))
    assert not torch.equal(exact, blockscale.linear(x, w))
    observe.calls.clear()
    blockscale.linear(x, w, kernel="reference")
    blockscale.linear(x, w, kernel="reference")
    assert observe.calls == {"reference.linear": 2}


def test_what_was_wrong_at_first_is_wrong_again(w, x):
    blockscale.linear(x, w)
    with pytest.raises(blockscale.ShapeError, match="the same K"):
        blockscale.linear(x[:, :512], w)
    with pytest.raises(blockscale.ShapeError, match=r"needs bias \[192\], got \[191\]"):
        blockscale.linear(x, w, torch.zeros(191))
    with pytest.raises(blockscale.DtypeError, match="bias needs float32, bfloat16 or float16, got torch.int64"):
        blockscale.linear(x, w, torch.zeros(192, dtype=torch.int64))
    with pytest.raises(blockscale.DtypeError, match="bias is on meta, the weight on cpu"):
        blockscale.linear(x, w, torch.zeros(192, device="meta"))
    with pytest.raises(blockscale.DtypeError, match="quantized x goes to matmul"):
        blockscale.linear(x.to(torch.float8_e4m3fn), w)
    with pytest.raises(blockscale.DtypeError, match="x is on meta, the weight on cpu"):
        blockscale.linear(x.to("meta"), w)
    with pytest.raises(blockscale.ShapeError, match="the same K"):
        blockscale.linear(torch.tensor(1.0), w)


def test_another_kernel_is_seen_at_once(w, x, doubled):
    module = nn.Linear(w)
    before = blockscale.linear(x, w), module(x)
    doubled()
    slow = blockscale.linear(x, w, kernel="reference")
    for y, old in zip((blockscale.linear(x, w), module(x)), before, strict=True):
        assert torch.equal(y, 2 * slow)
        assert not torch.equal(y, old)


def test_gradients_come_through_a_bound_weight(w, x):
    blockscale.linear(x, w)
    for leaf in (x.clone().requires_grad_(), torch.zeros(192, requires_grad=True)):
        y = blockscale.linear(leaf, w) if leaf.shape == x.shape else blockscale.linear(x, w, leaf)
        y.sum().backward()
        assert leaf.grad is not None


def test_those_who_listen_hear_a_bound_weight(w, x):
    y = blockscale.linear(x, w)
    with torch.profiler.profile() as seen:
        blockscale.linear(x, w)
    assert [e.key for e in seen.key_averages() if e.key.startswith("blockscale.linear[3x192x576]")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated; what still uses it must not break
        assert "blockscale::linear" in str(torch.jit.trace(lambda x: blockscale.linear(x, w), x).graph)
    rows = torch.func.vmap(lambda x: blockscale.linear(x[None], w)[0])(x)
    torch.testing.assert_close(rows, y, rtol=1e-5, atol=1e-4)
    compiled = torch.compile(lambda x: blockscale.linear(x, w), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), y)


def test_copies_and_pickles_leave_it_behind(w, x):
    module = nn.Linear(w, torch.randn(192))
    y, z = blockscale.linear(x, w), module(x)
    for other in (copy.deepcopy(w), saved_and_loaded(w)):
        assert other.bound is None
        assert torch.equal(blockscale.linear(x, other), y)
    for other in (copy.deepcopy(module), saved_and_loaded(module)):
        assert other._bound is None
        assert torch.equal(other(x), z)


def test_a_module_follows_its_buffers(w, x):
    module = nn.Linear(w)
    module(x)
    other = blockscale.quantize(torch.randn(192, 576), "fp8_128x128_ue8m0")
    module.set_weight(other)
    assert torch.equal(module(x), blockscale.linear(x, other))
    module.to("meta")
    assert module(x.to("meta")).device.type == "meta"
    module.kernel = "no.such"
    with pytest.raises(blockscale.UnknownNameError, match=r"no\.such"):
        nn.Linear(w, kernel="no.such")(x)
