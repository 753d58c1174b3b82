"""Hopper's fp8 sums on a CPU, as kernels: what the card's tensor cores do to a product, without a card.

DeepSeek-V3 report, section 3.3.2: the products of one instruction (32) and the sum so far are aligned to the largest of
them and truncated to 13 bits after its leading one; every 128 the sum goes to an fp32 register. On an H100 the worst
row errors of whole models are up to 3.3e-4 (bench/results/h100-models.json); this gives the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from blockscale import reference, registry
from blockscale.layouts import decode_scale

BITS = 13


def summed(a, b):
    """`a: [M, 128 at most]`, `b: [N, same]`, decoded fp8 -> `[M, N]` fp32."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    for k in range(0, a.shape[1], 32):
        products = a[:, None, k : k + 32].double() * b[None, :, k : k + 32].double()
        addends = torch.cat([products, total[..., None]], -1)
        exponent = torch.frexp(addends.abs().amax(-1, keepdim=True)).exponent - 1
        step = torch.exp2(exponent.double() - BITS)
        total = (torch.trunc(addends / step) * step).sum(-1)
    return total.float()


def product(x, w, numerics):
    """`x: [M, K]`, `w: [N, K]` in 128x128 blocks -> `[M, N]` fp32."""
    q = reference.quantize_activations(x, numerics.activation_format(w.format), w, numerics)
    a, b = reference.decode(q.data, q.format), reference.decode(w.data, w.format)
    row, col = decode_scale(q.scale), decode_scale(w.scale).repeat_interleave(128, 0)[: w.shape[0]]
    y = torch.zeros(x.shape[0], w.shape[0])
    for i in range(row.shape[1]):
        block = slice(128 * i, 128 * i + 128)
        y += summed(a[:, block], b[:, block]) * row[:, i : i + 1] * col[:, i]
    return y


class _Simulated:
    layout, priority, m_range = "row", 1000, (1, None)
    accumulation_error = 2.0**-10

    def why_not(self, problem, platform):
        acts = problem.numerics and problem.format and problem.numerics.activation_format(problem.format)
        if problem.format is None or problem.format.block != (128, 128) or not acts or acts.block != (1, 128):
            yield "needs fp8 in 128x128 blocks and activations in groups of 128"


class Linear(_Simulated):
    name, op = "hopper_sums.linear", "linear"

    def run(self, problem, x, w, bias):
        return product(x.float(), w, problem.numerics).to(problem.out_dtype)


class GroupedLinear(_Simulated):
    name, op = "hopper_sums.grouped_linear", "grouped_linear"

    def run(self, problem, x, w, offsets):
        y, start = x.new_zeros(x.shape[0], w.shape[1]), 0
        for expert, end in enumerate(offsets.tolist()):
            if end > start:
                y[start:end] = product(x[start:end].float(), w[expert], problem.numerics)
            start = max(start, end)
        return y


@contextmanager
def registered(*kernels) -> Iterator[None]:
    """These kernels (by default the two simulated ones) chosen before every other, within the context."""
    kernels = kernels or (Linear(), GroupedLinear())
    for kernel in kernels:
        registry.register(kernel)
    try:
        yield
    finally:
        for kernel in kernels:
            registry.unregister(kernel)
