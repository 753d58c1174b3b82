"""Multiplication by experts: every way to say which rows are whose."""

import pytest
import torch

from blockscale import ShapeError, reference
from blockscale.formats import get_format
from blockscale.kernels.triton import grouped, operands
from blockscale.numerics import get_numerics

F16, F32 = torch.float16, torch.float32
E, N, K = 5, 72, 192
FORMATS = [
    ("fp8_128x128", "checkpoint", F32), ("fp8_32x32_ue8m0", "deepseek_v4_1", F32), ("fp8_row", "checkpoint", F32),
    ("mxfp4", "deepseek_v4", F32), ("mxfp4", "weight_only", F16), ("nvfp4", "weight_only", F16),
]  # fmt: skip


def setting(name, policy, dtype, rows, platform, g):
    """weights, numerics, x as it is and as the kernel takes it"""
    numerics, fmt = get_numerics(policy), get_format(name)
    w = reference.quantize(torch.randn(E, N, K, generator=g), fmt)
    x = torch.randn(rows, K, generator=g).to(dtype)
    act = numerics.activation_format(fmt)
    return w, numerics, x, x if act is None else operands.quantize_activations(x, act, w, numerics, platform)


def assert_rows(y, want):
    zero = want.norm(dim=1) == 0
    assert (y[zero] == 0).all()
    error = (y.double() - want.double()).norm(dim=1)[~zero] / want.double().norm(dim=1)[~zero]
    assert float(error.max()) < 3e-7


@pytest.mark.parametrize(("name", "policy", "dtype"), FORMATS)
def test_sorted(name, policy, dtype, platform, g):
    """Empty experts, slices that end inside a tile, and rows behind the last one."""
    w, numerics, x, _ = setting(name, policy, dtype, 23, platform, g)
    offsets = torch.tensor([0, 3, 3, 19, 20], dtype=torch.int32)
    y = grouped.grouped_linear(x, w, offsets, numerics, F32, platform)
    assert_rows(y, reference.grouped_linear(x.float(), w, offsets, numerics=numerics))
    assert (y[20:] == 0).all()


@pytest.mark.parametrize(("name", "policy", "dtype"), FORMATS[:1] + FORMATS[3:5])
def test_pairs(name, policy, dtype, platform, g):
    w, numerics, x, xq = setting(name, policy, dtype, 3, platform, g)
    ids = torch.tensor([[4, 0], [0, 0], [-1, 2]], dtype=torch.int32)
    y = grouped.grouped_matmul(xq, w, ids, platform, rows="pairs", out_dtype=F32)
    want = [
        reference.linear(x[t : t + 1].float(), w[e], numerics=numerics)[0] if e >= 0 else torch.zeros(N)
        for t in range(3)
        for e in ids[t].tolist()
    ]
    assert_rows(y, torch.stack(want))


@pytest.mark.parametrize(("name", "policy", "dtype"), FORMATS[:1] + FORMATS[5:])
def test_masked(name, policy, dtype, platform, g):
    w, numerics, x, xq = setting(name, policy, dtype, E * 20, platform, g)
    counts = torch.tensor([0, 20, 3, 1, 17], dtype=torch.int32)
    y = grouped.grouped_matmul(xq, w, counts, platform, rows="masked", out_dtype=F32).view(E, 20, N)
    for e, count in enumerate(counts.tolist()):
        if count:
            rows = x.view(E, 20, K)[e, :count].float()
            assert_rows(y[e, :count], reference.linear(rows, w[e], numerics=numerics))


def test_one_row_for_many_experts(platform, g):
    w, numerics, x, _ = setting("fp8_128x128", "checkpoint", F32, 1, platform, g)
    offsets = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)
    y = grouped.grouped_linear(x, w, offsets, numerics, F32, platform)
    assert_rows(y, reference.grouped_linear(x, w, offsets, numerics=numerics))


def test_wrong_shapes_are_named(platform, g):
    w, _, _, xq = setting("fp8_128x128", "checkpoint", F32, 3, platform, g)
    with pytest.raises(ShapeError, match=r"grouped \(sorted\): x \[3, 192\], w \[5, 72, 192\] and where \[4\]"):
        grouped.grouped_matmul(xq, w, torch.zeros(4, dtype=torch.int32), platform)
