"""Commands under torchrun: one model for all ranks, and one voice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import BlockscaleError

Ep = Annotated[
    int | None,
    typer.Option(min=1, help="Under torchrun: groups of ranks that hold whole experts. Default: one rank a group."),
]
Exchange = Annotated[
    Literal["dispatch", "reduce"],
    typer.Option(help="Under torchrun: tokens travel to their experts, or every rank serves all tokens and they add."),
]
Timeout = Annotated[
    float, typer.Option(min=1, help="Under torchrun: seconds without a sign of life that end a rank, and the run.")
]


@contextmanager
def shared(
    checkpoint: Path, device: str, numerics: str, ep: int | None, exchange: Any, timeout: float
) -> Iterator[Any]:
    """`integrations.transformers.Parallel` when torchrun started this process as one of several, None when not."""
    from ..parallel import joined, plan_sharding, started

    if not started():
        if ep not in (None, 1):
            raise BlockscaleError(f"--ep {ep} needs several ranks: torchrun --nproc-per-node N -m blockscale …")
        yield None
        return
    from ..checkpoint import open_checkpoint
    from ..policy import model_policy

    with joined(device, ep=lambda size: ep or default_groups(checkpoint, size), timeout=timeout) as world:
        from .run import integration

        integration()
        from ..integrations.transformers import Parallel

        found = open_checkpoint(checkpoint)
        plan = plan_sharding(found, world.size, world.ep, model_policy(numerics, found.config))
        yield Parallel(world, plan, exchange)


def default_groups(checkpoint: Path, ranks: int) -> int:
    """Every rank a group of its own where there are experts enough, else the most groups that divide the ranks."""
    from ..checkpoint import open_checkpoint
    from ..parallel.planner import count_experts

    experts = count_experts(open_checkpoint(checkpoint))
    return max(groups for groups in range(1, ranks + 1) if ranks % groups == 0 and groups <= max(1, experts))


def speaks(parallel: Any) -> bool:
    """Whether this process prints."""
    return parallel is None or bool(parallel.world.speaks)


def report(parallel: Any) -> dict[str, Any] | None:
    """The part of a report that says how the model was shared; None for one process."""
    if parallel is None:
        return None
    world, plan = parallel.world, parallel.plan
    return {
        "ranks": world.size,
        "expert_groups": world.ep,
        "exchange": parallel.exchange,
        "share_bytes": [plan.nbytes(rank) for rank in range(world.size)],
    }


def words(ranks: dict[str, Any]) -> tuple[str, str]:
    """The same for people."""
    largest = max(ranks["share_bytes"])
    return f"{ranks['ranks']}", f"{ranks['expert_groups']} expert groups, at most {largest / 1e6:.1f} MB a rank"
