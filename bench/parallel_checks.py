"""Conformance before timing: parts over ranks against the whole layer on each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from blockscale import nn, reference
from blockscale.numerics import get_numerics
from blockscale.parallel import (
    ColumnParallelLinear,
    ParallelExperts,
    RowParallelLinear,
    World,
    piece,
    take,
)
from blockscale.parallel.cuts import cut
from blockscale.parallel.piece import activation_group
from parallel_layers import Moe, random_weight, tokens

COLUMNS = (
    # N, K, tokens, format: aligned, and cut inside a block (576 over 2, 192 over 4)
    (4096, 1024, 1, "fp8_128x128"),
    (4096, 1024, 256, "fp8_128x128"),
    (576, 1024, 64, "fp8_128x128"),
    (192, 512, 256, "fp8_128x128"),
)
ROWS = ((512, 4096, 64, 128), (512, 320, 64, 128), (512, 192, 16, 128))
"""N, K, tokens, unit of the cuts: aligned, and with activation groups on two ranks."""
BOUND = 2.0**-9
"""Of the sum of magnitudes: twice what Hopper's fp8 sums are declared to cost, once for each order of the sum."""


def layers(world: World, say: Callable[..., None]) -> list[dict[str, Any]]:
    """Column and row parallel. Raises RuntimeError when something is out of bounds."""
    found = []
    for kernel in (None, "triton.invariant") if world.device.type == "cuda" else (None, "reference"):
        found += [_column(world, *shape, kernel) for shape in COLUMNS]
    found += [_row(world, *shape) for shape in ROWS]
    for row in found:
        say("conformance", row)
    wrong = [row for row in found if not row["ok"]]
    if wrong:
        raise RuntimeError(f"conformance failed: {wrong}")
    return found


def _column(world: World, n: int, k: int, m: int, fmt: str, kernel: str | None) -> dict[str, Any]:
    """Equal rows: bit for bit with a kernel whose sums do not depend on N, else within the kernels' bound."""
    weight, x = random_weight((n, k), world.device, n, fmt), tokens(m, k, world.device)
    want = nn.Linear(weight, numerics="deepseek_v3", kernel=kernel)(x)
    rows = tuple((r,) for r in cut(n, world.size, 128))
    part = take(weight, piece((n, k), weight.format, rows=rows[world.rank]))
    layer = ColumnParallelLinear(
        part,
        group=world.tp,
        rows=rows,
        gather=True,
        numerics="deepseek_v3",
        kernel=kernel,
    )
    got, again = layer(x), layer(x)
    over = _over(got, want, x, weight)
    equal = bool(torch.equal(got, want))
    return {
        "what": f"column {n}x{k} M={m} over {world.size}", "kernel": kernel or layer.plan(x.dtype).pick(m).name,
        "part": part.format.name, "bit_equal": equal, "deterministic": bool(torch.equal(got, again)),
        "error_over_bound": over, "ok": over <= 1,
    }  # fmt: skip


def _row(world: World, n: int, k: int, m: int, unit: int) -> dict[str, Any]:
    weight, x = random_weight((n, k), world.device, k), tokens(m, k, world.device)
    x[:, 1] *= 30  # the largest of its group lies on one rank
    want = nn.Linear(weight, numerics="deepseek_v3")(x)
    cols = cut(k, world.size, unit)
    group = activation_group(weight.format, get_numerics("deepseek_v3"), False)
    part = piece((n, k), weight.format, cols=cols, rank=world.rank, group=group)
    layer = RowParallelLinear(take(weight, part), group=world.tp, part=part, numerics="deepseek_v3")
    begin, end = cols[world.rank]
    over = _over(layer(x[:, begin:end].contiguous()), want, x, weight)
    return {
        "what": f"row {n}x{k} M={m} over {world.size}", "cut_groups": len(part.cut), "error_over_bound": over,
        "ok": over <= 1,
    }  # fmt: skip


def _over(got: Tensor, want: Tensor, x: Tensor, weight: Any) -> float:
    """Largest error over its bound: the kernels' sums, and one rounding to bf16 of each."""
    size = x.float().abs() @ reference.dequantize(weight).abs().mT
    bound = BOUND * size + 2.0**-7 * want.float().abs() + 1e-30
    return float(((got.float() - want.float()).abs() / bound).max())


def agree(world: World, what: str, got: Tensor, want: Tensor, say: Callable[..., None]) -> dict[str, Any]:
    """A layer over ranks, called eagerly, against the whole one: the worst row of all ranks. Raises if wrong."""
    error = ((got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1)).max().view(1)
    found = {"what": what, "row": float(world.tp.all_reduce(error, "max"))}
    found["ok"] = found["row"] < 6e-3  # bf16 results of two matrices and a sum in another order
    if not found["ok"]:
        raise RuntimeError(f"conformance failed: {found}")
    say("conformance", found)
    return found


def experts(
    world: World,
    moe: Moe,
    spread: Mapping[str, ParallelExperts],
    say: Callable[..., None],
) -> list[dict[str, Any]]:
    """Both exchanges against the whole layer, one token (ranks without any) and many."""
    found = []
    for t in (1, 33):
        x = tokens(t, moe.s.hidden, world.device)
        index, weights = moe.routing(t, world.device)
        want = moe.whole(x, index, weights).float()
        for how, layer in spread.items():
            got = layer(x, index, weights).float()
            error = float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
            ok = error < 6e-3  # bf16 results of two matrices and a sum, worst row
            found.append(
                {
                    "what": f"experts {how} T={t}",
                    "bit_equal": bool(torch.equal(got, want)),
                    "row": error,
                    "ok": ok,
                }
            )
            say("conformance", found[-1])
            if not ok:
                raise RuntimeError(f"conformance failed: {found[-1]}")
    return found
