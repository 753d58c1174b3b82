"""Multiplication by experts: every way to say which rows are whose."""

from dataclasses import replace

import pytest
import torch

from blockscale import Problem, ShapeError, reference, routed
from blockscale.formats import get_format
from blockscale.kernels.triton import KERNELS, grouped
from blockscale.numerics import get_numerics

F16, F32 = torch.float16, torch.float32
E, N, K = 5, 72, 192
FORMATS = [
    ("fp8_128x128", "checkpoint", F32), ("fp8_32x32_ue8m0", "deepseek_v4_1", F32), ("fp8_row", "checkpoint", F32),
    ("mxfp4", "deepseek_v4", F32), ("mxfp4", "weight_only", F16), ("nvfp4", "weight_only", F16),
    ("nvfp4", "checkpoint", F32),
]  # fmt: skip


def setting(name, policy, dtype, rows, g):
    """weights, numerics, x"""
    w = reference.quantize(torch.randn(E, N, K, generator=g), get_format(name))
    return w, get_numerics(policy), torch.randn(rows, K, generator=g).to(dtype)


def run(op, x, w, where, policy):
    """What the registered kernel gives, in fp32."""
    kernel = next(k for k in KERNELS if k.op == op and k.name == "triton.block")
    problem = Problem(op, N, K, x.dtype, w.format, out_dtype=F32, numerics=get_numerics(policy), groups=E)
    return kernel.run(problem, x, w, where)


def assert_rows(y, want):
    zero = want.norm(dim=1) == 0
    assert (y[zero] == 0).all()
    error = (y.double() - want.double()).norm(dim=1)[~zero] / want.double().norm(dim=1)[~zero]
    assert float(error.max()) < 3e-7


@pytest.mark.parametrize(("name", "policy", "dtype"), FORMATS)
def test_sorted(name, policy, dtype, platform, g):
    """Empty experts, slices that end inside a tile, and rows behind the last one."""
    w, numerics, x = setting(name, policy, dtype, 23, g)
    offsets = torch.tensor([0, 3, 3, 19, 20], dtype=torch.int32)
    y = grouped.grouped_linear(x, w, offsets, numerics, F32, platform)
    assert_rows(y, reference.grouped_linear(x.float(), w, offsets, numerics=numerics))
    assert (y[20:] == 0).all()


@pytest.mark.parametrize(("name", "policy", "dtype"), FORMATS)
def test_gathered(name, policy, dtype, g):
    """Rows that share an expert, an expert named twice, ids that stand for none on both sides."""
    w, numerics, x = setting(name, policy, dtype, 3, g)
    ids = torch.tensor([[4, 0], [0, 0], [-1, 5]], dtype=torch.int32)
    y = run("gathered_linear", x, w, ids, policy)
    assert y.shape == (3, 2, N)
    assert_rows(y.flatten(0, 1), routed.gathered_linear(x.float(), w, ids, numerics=numerics).flatten(0, 1))
    assert (y[2] == 0).all()


@pytest.mark.parametrize(("name", "policy", "dtype"), FORMATS)
def test_masked(name, policy, dtype, g):
    """No row, all rows, a tile and a bit; NaN in rows that hold no token."""
    w, numerics, x = setting(name, policy, dtype, E * 40, g)
    x, counts = x.view(E, 40, K), torch.tensor([0, 40, 3, 1, 33], dtype=torch.int32)
    for e, count in enumerate(counts.tolist()):
        x[e, count:] = torch.nan
    y = run("masked_linear", x, w, counts, policy)
    assert_rows(y.flatten(0, 1), routed.masked_linear(x.float(), w, counts, numerics=numerics).flatten(0, 1))


@pytest.mark.parametrize("op", ["grouped_linear", "masked_linear", "gathered_linear"])
def test_levels_stored_beside_the_weight(op, g):
    """NVFP4 with an `input_scale` for each expert: no maximum is taken."""
    w, numerics, x = setting("nvfp4", "checkpoint", F32, E * 2, g)
    w = replace(w, input_scale=torch.rand(E, generator=g) * 1e-2 + 1e-3)
    where = {
        "grouped_linear": torch.tensor([2, 2, 5, 9, 10], dtype=torch.int32),
        "masked_linear": torch.tensor([2, 0, 1, 2, 1], dtype=torch.int32),
        "gathered_linear": torch.randint(-1, E, (E * 2, 3), generator=g, dtype=torch.int32),
    }[op]
    x = x.view(E, 2, K) if op == "masked_linear" else x
    define = reference.grouped_linear if op == "grouped_linear" else getattr(routed, op)
    y = run(op, x, w, where, "checkpoint")
    assert_rows(y.reshape(-1, N), define(x, w, where, numerics=numerics).reshape(-1, N))


def test_a_row_has_the_same_bytes_in_every_batch_where_that_was_ordered(platform, g):
    w, numerics, x = setting("fp8_128x128", "checkpoint", F32, 170, g)
    same = []
    for rows in (1, 4, 170):
        offsets = torch.full((E,), rows, dtype=torch.int32)
        y = grouped.grouped_linear(x[:rows], w, offsets, numerics, F32, platform, invariant=True)
        same.append(y[0])
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])


def test_one_row_for_many_experts(platform, g):
    w, numerics, x = setting("fp8_128x128", "checkpoint", F32, 1, g)
    offsets = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)
    y = grouped.grouped_linear(x, w, offsets, numerics, F32, platform)
    assert_rows(y, reference.grouped_linear(x, w, offsets, numerics=numerics))


def test_wrong_shapes_are_named(platform, g):
    w, _, x = setting("fp8_128x128", "checkpoint", F32, 3, g)
    with pytest.raises(ShapeError, match=r"grouped \(sorted\): x \[3, 192\], w \[5, 72, 192\] and where \[4\]"):
        grouped.grouped_matmul(x, w, torch.zeros(4, dtype=torch.int32), platform)
