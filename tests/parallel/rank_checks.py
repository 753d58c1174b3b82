"""What every rank does in the tests of `blockscale.parallel`."""

import torch

from blockscale import nn, reference
from blockscale.checkpoint import open_checkpoint
from blockscale.formats import get_format
from blockscale.integrations import transformers as integration
from blockscale.numerics import get_numerics
from blockscale.parallel import (
    ColumnParallelLinear,
    Group,
    ParallelExperts,
    ParallelMLP,
    RowParallelLinear,
    piece,
    plan_sharding,
    take,
)
from blockscale.parallel.cuts import cut, shares
from blockscale.parallel.piece import activation_group
from blockscale.policy import model_policy

_models = {}
IDS = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(5))


def weight(n, k, fmt, seed=0):
    made = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.1
    fmt = get_format(fmt)
    return reference.quantize(made, fmt, global_scale=torch.tensor(1e-4) if fmt.two_level else None)


def tokens(rows, k, dtype=torch.float32, seed=1):
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    x[:, 1] *= 30  # the largest of its group lies on one rank only
    return x.to(dtype)


def column(world, n, k, fmt, numerics, dtype, gather):
    """Bit for bit the rows of one device."""
    whole, x = weight(n, k, fmt), tokens(5, k, dtype)
    want = nn.Linear(whole, numerics=numerics)(x)
    ranges = cut(n, world.size, whole.format.block[0] or 16)
    rows = tuple((r,) for r in ranges)
    part = take(whole, piece((n, k), whole.format, rows=rows[world.rank]))
    got = ColumnParallelLinear(part, group=world.tp, rows=rows, gather=gather, numerics=numerics)(x)
    begin, end = ranges[world.rank]
    assert torch.equal(got, want if gather else want[:, begin:end])
    return part.format.name


def fused_column(world, half, k, fmt):
    """Gate and up in one matrix: each rank holds its part of both, and gathering restores the order."""
    whole, x = weight(2 * half, k, fmt), tokens(3, k)
    ranges = cut(half, world.size, 128)
    rows = tuple(((b, e), (half + b, half + e)) for b, e in ranges)
    part = take(whole, piece((2 * half, k), whole.format, rows=rows[world.rank]))
    got = ColumnParallelLinear(part, group=world.tp, rows=rows, gather=True)(x)
    assert torch.equal(got, nn.Linear(whole)(x))


def row(world, n, k, fmt, numerics, dtype, unit, scatter):
    """Within the order of an fp32 sum; for bf16 results, one rounding."""
    whole, x = weight(n, k, fmt), tokens(2 * world.size, k, dtype)
    policy = get_numerics(numerics)
    exact = reference.linear(x.float(), whole, numerics=policy)
    ranges = cut(k, world.size, unit)
    group = activation_group(whole.format, policy, False)
    part = piece((n, k), whole.format, cols=ranges, rank=world.rank, group=group)
    layer = RowParallelLinear(
        take(whole, part), group=world.tp, part=part, numerics=numerics, scatter=scatter, chunks=1 if scatter else 2
    )
    begin, end = ranges[world.rank]
    got = layer(x[:, begin:end]).float()
    if scatter:
        exact = exact[2 * world.rank : 2 * world.rank + 2]
    size = reference.linear(x.float().abs(), _absolute(whole), numerics=get_numerics("weight_only"))
    if scatter:
        size = size[2 * world.rank : 2 * world.rank + 2]
    bound = 4 * 2**-24 * size + (exact.abs() * 2**-8 if dtype == torch.bfloat16 else 0)
    worst = float(((got - exact).abs() / bound).max())
    assert worst <= 1, worst
    return len(part.cut)


def _absolute(w):
    data = w.data.view(torch.uint8)
    data = (data & 0x77) if w.format.packed else (data & 0x7F).view(w.data.dtype)
    return type(w)(data, w.scale, w.format, shape=w.shape, global_scale=w.global_scale)


def model(world, folder, plan_options, numerics, exchange, dtype=torch.float32, ids=IDS):
    """Logits of the model over the ranks, how many bytes were read, and the share."""
    loaded = load(world, folder, plan_options, numerics, exchange, dtype)
    with torch.no_grad():
        logits = loaded(ids).logits
    plain = sum(loaded.blockscale_rank.plan.plain_bytes(world.rank).values())
    head = {n: b for n, b in loaded.blockscale_rank.plan.plain_bytes(world.rank).items() if "head" in n}
    return logits.numpy(), loaded.blockscale_rank.bytes_read, loaded.blockscale_rank.share - plain + sum(head.values())


def load(world, folder, plan_options, numerics, exchange, dtype=torch.float32):
    checkpoint = open_checkpoint(folder)
    policy = model_policy(numerics, checkpoint.config)
    plan = plan_sharding(checkpoint, world.size, world.ep, policy, **plan_options)
    how = integration.Parallel(world, plan, exchange)
    return integration.load(folder, dtype=dtype, numerics=numerics, parallel=how)


def mlp(world, chunks, numerics):
    """Tokens on all ranks: FP8 on the wire, sums scattered back."""
    hidden, inner, each = 256, 512, 4
    gate_up, down = weight(2 * inner, hidden, "fp8_128x128", 3), weight(hidden, inner, "fp8_128x128", 4)
    x = tokens(each * world.size, hidden, torch.bfloat16)
    whole = nn.Linear(gate_up, numerics=numerics)(x)
    want = nn.Linear(down, numerics=numerics)(reference.swiglu(whole)).float()
    ranges = cut(inner, world.size, 128)
    rows = tuple(((b, e), (inner + b, inner + e)) for b, e in ranges)
    first = piece((2 * inner, hidden), gate_up.format, rows=rows[world.rank])
    second = piece((hidden, inner), down.format, cols=ranges, rank=world.rank, group=128)
    layer = ParallelMLP(
        ColumnParallelLinear(take(gate_up, first), group=world.tp, rows=rows, rows_of_x=True, numerics=numerics),
        RowParallelLinear(take(down, second), group=world.tp, part=second, scatter=True, numerics=numerics),
        chunks=chunks,
    )
    mine = torch.arange(world.size * each).view(world.size, each)[world.rank]
    got = layer(x[mine]).float()
    # chunks take the same slice of every rank's tokens, so results come back where they started
    return float((got - want[mine]).norm() / want[mine].norm()), layer.gate_up.wire.format is not None
