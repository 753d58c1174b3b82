"""What every rank does in the tests of `blockscale.parallel`."""

from functools import partial

import torch

from blockscale import nn, reference
from blockscale.checkpoint import open_checkpoint
from blockscale.errors import BlockscaleError
from blockscale.formats import get_format
from blockscale.integrations import transformers as integration
from blockscale.numerics import get_numerics
from blockscale.parallel import (
    ColumnParallelLinear,
    Group,
    ParallelExperts,
    ParallelMLP,
    RowParallelLinear,
    collectives,
    piece,
    plan_sharding,
    take,
)
from blockscale.parallel.cuts import cut, shares
from blockscale.parallel.piece import activation_group
from blockscale.policy import model_policy

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
    if policy.sums == "bfloat16":  # each addend once, and the backend's sum of two at each of its steps
        bound = bound + world.size * 2**-8 * size
    worst = float(((got - exact).abs() / bound).max())
    assert worst <= 1, worst
    return len(part.cut)


def halves(world, bias):
    """Large sums go by halves: scattered in fp32, rounded, gathered. The bits of the usual way for two ranks."""
    x = torch.randn(4 * world.size, 96, generator=torch.Generator().manual_seed(world.rank))
    offset = torch.arange(96.0) if bias else None
    usual = world.tp.start_sum(x.clone(), torch.bfloat16, offset)()
    collectives.LARGE, kept = 0, collectives.LARGE
    try:
        assert world.tp._by_halves(x, torch.bfloat16)
        assert not world.tp._by_halves(x[1:], torch.bfloat16)
        got = world.tp.start_sum(x.clone(), torch.bfloat16, offset)()
    finally:
        collectives.LARGE = kept
    return got.float().numpy(), usual.float().numpy()


def _absolute(w):
    data = w.data.view(torch.uint8)
    data = (data & 0x77) if w.format.packed else (data & 0x7F).view(w.data.dtype)
    return type(w)(data, w.scale, w.format, shape=w.shape, global_scale=w.global_scale)


def load(world, folder, numerics, exchange, dtype=torch.float32, **plan_options):
    checkpoint = open_checkpoint(folder)
    policy = model_policy(numerics, checkpoint.config)
    plan = plan_sharding(checkpoint, world.size, world.ep, policy, **plan_options)
    return integration.load(
        folder, dtype=dtype, numerics=numerics, parallel=integration.Parallel(world, plan, exchange)
    )


def logits(world, folder, numerics="reference", exchange="dispatch", **plan_options):
    """Of the model over the ranks, and whether each of them read its own bytes and no others of the weights it cuts."""
    model = load(world, folder, numerics, exchange, **plan_options)
    source = model.blockscale_rank
    heads = sum(source.plan.plain_bytes(world.rank)[name] for name in source.plan.plain)
    with torch.no_grad():
        return model(IDS).logits.numpy(), source.bytes_read, source.plan.layer_bytes(world.rank) + heads


def tokens_of(world, folder, count):
    """Greedy tokens, with a cache."""
    model = load(world, folder, "reference", "dispatch", torch.bfloat16)
    made = model.generate(IDS, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return made[0, IDS.shape[1] :].tolist()


def modules(world, folder, numerics, exchange):
    """Every layer on the input that it has in the whole model: columns bit for bit, sums within their bound.

    Returns how many layers of each kind were compared, and the worst relative row error of those that sum over ranks.
    """
    whole = integration.load(folder, dtype=torch.float32, numerics=numerics)
    spread = load(world, folder, numerics, exchange)
    source, seen = spread.blockscale_rank, {}
    for name, module in spread.named_modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, ParallelExperts)):
            hook = partial(_note, seen, name)
            whole.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        whole(IDS)
        found, worst = {}, 0.0
        for name, (args, want) in sorted(seen.items()):
            module = spread.get_submodule(name)
            kind = type(module).__name__
            found[kind] = found.get(kind, 0) + 1
            if isinstance(module, ColumnParallelLinear):
                layer = next(slot.layer for slot in spread.hf_quantizer.bindings.slots[name])
                split = source.plan.splits[layer.name]
                mine = torch.cat([want[..., b:e] for b, e in split.rows[world.rank]], -1)
                assert torch.equal(module(*args), want if module.gather else mine), name
            elif isinstance(module, RowParallelLinear):
                worst = max(worst, error(module(args[0][..., slice(*module.part.cols)]), want))
            else:
                got = module(*args)
                if exchange == "dispatch" and world.inner.size == 1:
                    assert torch.equal(got, want), name
                worst = max(worst, error(got, want))
    return found, worst


def _note(seen, name, module, args, result):
    seen[name] = (args, result)


def error(got, want):
    """Of the worst row."""
    got, want = got.flatten(0, -2), want.flatten(0, -2)
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)).max())


def zero_tokens(world, experts, exchange):
    """One token over all ranks: most have none, and some experts no row."""
    gate_up = stack(experts, 256, 128, 5)
    down = stack(experts, 128, 128, 6)
    owners = shares(experts, world.size)
    begin, end = owners[world.rank]
    part = piece((128, 128), down.format)
    some = [type(w)(w.data[begin:end], w.scale[begin:end], w.format) for w in (gate_up, down)]
    layer = ParallelExperts(*some, outer=world.tp, inner=Group(), owners=owners, part=part, exchange=exchange)
    whole = nn.Experts(gate_up, down)
    for rows, chosen in ((1, [[0, experts - 1]]), (2, [[experts, -1], [1, experts]]), (1, [[-1, 2]])):
        x, index = tokens(rows, 128), torch.tensor(chosen)
        weights = torch.full((rows, 2), 0.5)
        assert torch.equal(layer(x, index, weights), whole(x, index, weights))


def stack(experts, n, k, seed):
    parts = [weight(n, k, "fp8_128x128", seed * 100 + e) for e in range(experts)]
    data = torch.stack([p.data.view(torch.uint8) for p in parts]).view(parts[0].data.dtype)
    return type(parts[0])(data, torch.stack([p.scale for p in parts]), parts[0].format)


def compiled(world):
    """A column and a row parallel layer under torch.compile, as one graph."""
    first, second = weight(256, 128, "fp8_128x128", 7), weight(64, 256, "fp8_128x128", 8)
    ranges = cut(256, world.size, 128)
    rows = tuple((r,) for r in ranges)
    part = piece((64, 256), second.format, cols=ranges, rank=world.rank, group=128)
    column = ColumnParallelLinear(
        take(first, piece((256, 128), first.format, rows=rows[world.rank])), group=world.tp, rows=rows
    )
    row = RowParallelLinear(take(second, part), group=world.tp, part=part)
    x = tokens(3, 128)
    try:
        row(torch.relu(column(x.requires_grad_())))
        raise AssertionError("a gradient was promised")
    except BlockscaleError:
        x = x.detach()
    made = torch.compile(lambda x: row(torch.relu(column(x))), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(made(x), row(torch.relu(column(x))))


def mlp(world, chunks, numerics):
    """Tokens on all ranks: FP8 on the wire, sums scattered back."""
    hidden, inner, each = 256, 128 * world.size, 4
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
    if chunks == 1:  # a group of collectives takes one turn for all rows: the same sums
        assert torch.equal(layer._in_turns(x[mine], len(x)).float(), got)
    # chunks take the same slice of every rank's tokens, so results come back where they started
    return float((got - want[mine]).norm() / want[mine].norm()), layer.gate_up.wire.format is not None
