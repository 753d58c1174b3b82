"""Routed experts without transformers: against a loop over tokens."""

import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from blockscale import BlockScaled, nn, quantize, reference
from blockscale.errors import DtypeError, ShapeError
from blockscale.numerics import get_numerics

E, K, INNER, TOKENS, CHOSEN = 5, 128, 96, 7, 2


def stack(fmt, n, k):
    w = quantize(torch.randn(E, n, k) * 0.2, fmt)
    return replace(w, input_scale=torch.full((E,), 4 / (448 * 6))) if fmt == "nvfp4" else w  # else it is the batch's


def by_hand(x, index, weights, gate, up, down, limit, first, numerics):
    y = torch.zeros_like(x)
    run = lambda h, w: reference.linear(h[None], w, numerics=numerics)[0]  # noqa: E731
    for token in range(len(x)):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            if expert >= E:
                continue
            g, u = run(x[token], gate[expert]), run(x[token], up[expert])
            h = F.silu(g.clamp(max=limit)) * u.clamp(-limit, limit)
            y[token] += run(h * weight, down[expert]) if first else weight * run(h, down[expert])
    return y


def operands():
    x = torch.randn(TOKENS, K)
    index = torch.stack([torch.randperm(E)[:CHOSEN] for _ in range(TOKENS)])
    return x, index, torch.rand(TOKENS, CHOSEN)


@pytest.mark.parametrize("fmt", ["fp8_128x128", "fp8_32x32_ue8m0", "mxfp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("first", [False, True])
def test_a_pair_of_gate_and_up(fmt, first):
    gate, up, down = stack(fmt, INNER, K), stack(fmt, INNER, K), stack(fmt, K, INNER)
    module = nn.Experts((gate, up), down, limit=0.5, weigh_first=first)
    x, index, weights = operands()
    want = by_hand(x, index, weights, gate, up, down, 0.5, first, get_numerics("checkpoint"))
    torch.testing.assert_close(module(x, index, weights), want, rtol=1e-4, atol=1e-4)


def test_gate_and_up_in_one_weight():
    both, down = stack("fp8_32x32", 2 * INNER, K), stack("fp8_32x32", K, INNER)
    rows = INNER // 32
    gate, up = (
        BlockScaled(both.data[:, h * INNER : (h + 1) * INNER], both.scale[:, h * rows : (h + 1) * rows], both.format)
        for h in (0, 1)
    )
    x, index, weights = operands()
    want = by_hand(x, index, weights, gate, up, down, math.inf, False, get_numerics("weight_only"))
    got = nn.Experts(both, down, numerics="weight_only")(x, index, weights)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outside", [E, E + 3, -1])
def test_an_index_of_no_expert_contributes_nothing(outside):
    gate_up, down = stack("fp8_32x32", 2 * INNER, K), stack("fp8_32x32", K, INNER)
    module = nn.Experts(gate_up, down)
    x, index, weights = operands()
    nobody = module(x, torch.full_like(index, outside), weights)
    assert torch.equal(nobody, torch.zeros_like(x))
    index[:, 1] = outside
    torch.testing.assert_close(module(x, index, weights), module(x, index[:, :1], weights[:, :1]))


def test_experts_that_were_not_chosen_are_not_touched():
    gate_up, down = stack("fp8_32x32", 2 * INNER, K), stack("fp8_32x32", K, INNER)
    gate_up.scale[[0, 2, 3, 4]] = float("nan")
    down.scale[[0, 2, 3, 4]] = float("nan")
    y = nn.Experts(gate_up, down)(torch.randn(1, K), torch.tensor([[1]]), torch.ones(1, 1))
    assert y.isfinite().all()


def test_no_tokens():
    module = nn.Experts(stack("fp8_32x32", 2 * INNER, K), stack("fp8_32x32", K, INNER))
    assert module(torch.empty(0, K), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2)).shape == (0, K)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"gate_up \[5, 64, 128\] and down \[5, 128, 96\]"):
        nn.Experts(stack("fp8_32x32", 64, K), stack("fp8_32x32", K, INNER))


def test_casts_leave_the_bytes_alone_and_the_state_round_trips():
    module = nn.Experts(stack("fp8_32x32", 2 * INNER, K), stack("fp8_32x32", K, INNER))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    other = nn.Experts(stack("fp8_32x32", 2 * INNER, K), stack("fp8_32x32", K, INNER))
    other.load_state_dict(module.to(torch.bfloat16).state_dict())
    after = other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t.view(torch.uint8), after[name].view(torch.uint8)) for name, t in before.items())


def test_block_diagonal_linear_is_one_linear_for_each_group():
    w = quantize(torch.randn(3, 32, 64), "fp8_32x32_ue8m0")
    x = torch.randn(2, 5, 3, 64)
    y = nn.BlockDiagonalLinear(w)(x)
    want = torch.stack([reference.linear(x[:, :, g], w[g], numerics=get_numerics("checkpoint")) for g in range(3)], 2)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def test_dense_linear_is_nn_linear_that_trains_and_serves():
    plain = torch.nn.Linear(48, 24)
    ours = nn.DenseLinear.of(plain)
    assert ours.weight is plain.weight
    x = torch.randn(3, 48)
    torch.testing.assert_close(ours(x), plain(x))
    ours(x).sum().backward()
    assert ours.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
    assert ours.plan().pick(1).op == "dense_linear"


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with Linux's mprotect")
def test_a_decode_step_reads_no_byte_of_an_expert_that_was_not_chosen():
    """Data and scales of the others lie in pages that may not be read: a touched byte is a segmentation fault."""
    script = str(Path(__file__).with_name("guarded_experts.py"))
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 4 * 2 * 2  # formats, numerics, kernels
    faulty = subprocess.run([sys.executable, script, "chosen"], capture_output=True, text=True, check=False)
    assert (faulty.returncode, faulty.stdout) == (-signal.SIGSEGV, "")


def test_the_weight_of_no_expert_counts_for_nothing():
    """Rows that pad a batch hold anything."""
    module = nn.Experts(stack("fp8_32x32", 2 * INNER, K), stack("fp8_32x32", K, INNER))
    x, index, weights = operands()
    index[0, 1], index[1] = -1, E
    weights[0, 1] = weights[1] = 0.0
    want = module(x, index, weights)
    weights[0, 1], weights[1] = math.nan, math.inf
    assert torch.equal(module(x, index, weights), want)


def test_indices_that_are_none():
    module = nn.Experts(stack("fp8_32x32", 2 * INNER, K), stack("fp8_32x32", K, INNER))
    x, index, weights = operands()
    with pytest.raises(DtypeError, match="index needs int32 or int64, got torch.float32"):
        module(x, index.float(), weights)
    with pytest.raises(ShapeError, match=r"index \[T, k\] and weights \[T, k\], got \[7, 128\], \[7\] and \[7\]"):
        module(x, index[:, 0], weights[:, 0])
