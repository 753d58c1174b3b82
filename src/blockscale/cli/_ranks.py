"""Commands under torchrun: one model for all ranks, and one voice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..checkpoint import Checkpoint, open_checkpoint
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
Sums = Annotated[
    Literal["auto", "direct", "backend"],
    typer.Option(
        help="Under torchrun: sums through memory that GPUs of one host share (direct), by NCCL, XCCL or Gloo "
        "(backend), or direct where it can be. The report says which, and why."
    ),
]

PATIENCE = 30.0
"""Seconds in which the first rank of a host should have found what is wrong with the command."""


def follows() -> bool:
    """Whether torchrun started another rank on this host before this one."""
    from ..parallel import started

    return started() and os.environ.get("LOCAL_RANK", "0") != "0"


def let_the_first_speak() -> None:
    """To be called before this process prints what is wrong with the command, and ends with 2.

    The ranks of one torchrun have the same arguments and environment, so it is wrong for all, and the first of them
    says it for all: in any other this function does not return. torchrun ends everyone as soon as one has ended, so
    the others wait for that, lest the first be stopped before it has spoken; where nothing comes they speak.
    """
    if not follows():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, frame: os._exit(130 if got == signal.SIGINT else 2))
    time.sleep(PATIENCE)


@contextmanager
def shared(
    checkpoint: Path, device: str, numerics: str, ep: int | None, exchange: Any, timeout: float, sums: Any = "auto"
) -> Iterator[Any]:
    """`integrations.transformers.Parallel` when torchrun started this process as one of several, None when not."""
    from ..parallel import joined, plan_sharding, started

    if not started():
        if sums == "direct":
            raise BlockscaleError("--sums direct needs several ranks: torchrun --nproc-per-node N -m blockscale …")
        if ep not in (None, 1):
            raise BlockscaleError(f"--ep {ep} needs several ranks: torchrun --nproc-per-node N -m blockscale …")
        yield None
        return
    from ..policy import model_policy

    found = open_checkpoint(checkpoint)
    policy = model_policy(numerics, found.config)
    groups = ep or (lambda size: default_groups(found, size))
    with joined(device, ep=groups, timeout=timeout, sums=sums) as world:
        from .run import integration

        integration()
        from ..integrations.transformers import Parallel

        plan = plan_sharding(found, world.size, world.ep, policy)
        yield Parallel(world, plan, exchange)


def default_groups(checkpoint: Checkpoint, ranks: int) -> int:
    """Every rank a group of its own where there are experts enough, else the most groups that divide the ranks."""
    from ..parallel.planner import count_experts

    experts = count_experts(checkpoint)
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
        "sums": {"how": world.sums.how, "reason": world.sums.reason},
        "share_bytes": [plan.nbytes(rank) for rank in range(world.size)],
    }


def add_rows(table: Any, ranks: dict[str, Any] | None) -> None:
    """The same for people: rows of a table."""
    if ranks:
        largest = max(ranks["share_bytes"])
        groups = f"{ranks['expert_groups']} expert groups, at most {largest / 1e6:.1f} MB a rank"
        table.add_row("ranks", str(ranks["ranks"]), groups)
        table.add_row("sums", ranks["sums"]["how"], ranks["sums"]["reason"])
