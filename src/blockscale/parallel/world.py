"""The ranks of one run: started by torchrun, joined here, and ended together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from ..errors import BlockscaleError
from ..platform import named_device, require
from .collectives import Group
from .errors import PlanError, RankError
from .route import Route, Sums, choose
from .watch import Watch, speaks

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
"""torch.distributed's backend for each kind of device."""
COLLECTIVE = 10
"""A collective may wait this many times the timeout: ranks load at their own speed, and who lives is waited for."""


@dataclass(frozen=True)
class World:
    """This process among the others.

    rank, size: its number and how many there are. device: where it computes. tp: all ranks. outer: ranks that hold
    other experts, inner: ranks that hold other slices of the same ones (`plan`). sums: how those of all ranks travel.
    """

    rank: int
    size: int
    device: torch.device
    tp: Group
    outer: Group
    inner: Group
    sums: Route

    @property
    def speaks(self) -> bool:
        """Whether this rank prints results."""
        return self.rank == 0

    @property
    def ep(self) -> int:
        return self.outer.size


def started() -> bool:
    """Whether torchrun (or another launcher of torch.distributed) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(
    device: str = "cpu", *, ep: int | Callable[[int], int] = 1, timeout: float = 60.0, sums: Sums = "auto"
) -> Iterator[World]:
    """Join the ranks that torchrun started, for the time of the context.

    device: kind; each rank takes the one of its local number. ep: groups of experts, or what makes it from the number
    of ranks, which it must divide.
    timeout: seconds without a sign of life after which a rank is given up and all others end.
    sums: "direct" (through shared memory, `direct`), "backend" (torch.distributed's) or the better one that can be.

    An exception on one rank ends every process: the first report is printed once, by rank 0, and all leave with exit
    code 2 (130 when interrupted) without waiting for each other. Errors inside are therefore not for the caller.

    Raises BlockscaleError before all that, for a kind of device that is unknown or not here, or in a process that
    torchrun did not start.
    """
    kind = named_device(device).type
    if kind not in BACKENDS:
        raise BlockscaleError(f"parallel: needs a device of {', '.join(BACKENDS)}, got {device!r}")
    if "RANK" not in os.environ:
        raise BlockscaleError("parallel: needs ranks, this process is none: torchrun --nproc-per-node N …")
    require(torch.device(kind))
    store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
    here = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind != "cpu" else torch.device("cpu")
    watch = Watch(store.clone(), rank, size, timeout)
    watch.start()
    try:
        if kind != "cpu":
            require(here)  # the host may have fewer of them than ranks
            torch.get_device_module(kind).set_device(here)
        groups = ep if isinstance(ep, int) else ep(size)
        if size % groups:
            raise PlanError(f"ep={groups} must divide the {size} ranks: experts lie in ep groups of equal size")
        dist.init_process_group(
            BACKENDS[kind], store=PrefixStore("blockscale", store), rank=rank, world_size=size,
            timeout=timedelta(seconds=COLLECTIVE * timeout), device_id=None if kind == "cpu" else here,
        )  # fmt: skip
        everyone, route = choose(sums, here, int(os.environ.get("LOCAL_WORLD_SIZE", size)), BACKENDS[kind])
        yield World(rank, size, here, *_groups(everyone, kind, groups, size), route)
        watch.stop()
        dist.destroy_process_group()
    except KeyboardInterrupt:
        watch.stop()
        if rank == 0:
            print("interrupted", file=sys.stderr)
        _exit(130)
    except Exception as e:
        _fail(watch, e)


def _groups(everyone: Group, kind: str, ep: int, size: int) -> tuple[Group, Group, Group]:
    if ep in (1, size):
        return (everyone, Group(), everyone) if ep == 1 else (everyone, everyone, Group())
    mesh = init_device_mesh(kind, (ep, size // ep), mesh_dim_names=("experts", "slices"))
    return everyone, Group(mesh.get_group("experts")), Group(mesh.get_group("slices"))


def _fail(watch: Watch, error: Exception) -> None:
    """Report, print once, and end. An error of ours stands; a failed collective is the echo of another rank's end."""
    message = None
    try:
        if isinstance(error, (BlockscaleError, OSError)) and not isinstance(error, RankError):
            message = str(error)
            watch.report(message)
            message = f"rank {watch.rank} of {watch.size}: {message}"
        elif isinstance(error, (RankError, dist.DistError)) or _is_echo(error):
            message = watch.cause(error)
        else:
            watch.report(f"{type(error).__name__}: {error}")
            raise error
        watch.stop()
    except (dist.DistError, ConnectionError):
        message = message or f"rank {watch.rank} of {watch.size}: {error}"
    if speaks(watch.rank, message):
        print(f"error: {message}", file=sys.stderr, flush=True)
    _exit(2)


def _is_echo(error: Exception) -> bool:
    """Gloo reports a lost peer as a plain RuntimeError."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "Connection", "peer", "NCCL"))


def _exit(code: int) -> None:
    """End without torch.distributed's own goodbye, which would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
