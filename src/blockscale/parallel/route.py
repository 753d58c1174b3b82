"""How sums travel between ranks: through memory that GPUs of one host share, or by torch.distributed's backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from .. import platform
from ..errors import BlockscaleError
from ..platform import Platform
from .collectives import Group
from .direct import MOST, DirectGroup

Sums = Literal["auto", "direct", "backend"]


@dataclass(frozen=True)
class Route:
    """how: "direct" or "backend". reason: why that, for people."""

    how: str
    reason: str


def why_not_direct(here: Platform, ranks: int, local_ranks: int, apart: list[str]) -> Iterator[str]:
    """Every reason against sums through shared memory; none means that they are used. Pure.

    here: this rank's device. local_ranks: those on its host. apart: what `platform.apart` found there.
    """
    if here.kind != "cuda":
        yield f"{here.kind} devices: only cuda devices share memory in this version"
        return
    if not here.has("triton"):
        yield "its kernels need triton"
    if local_ranks != ranks:
        yield f"{ranks} ranks are spread over hosts, {local_ranks} of them here"
    if ranks > MOST:
        yield f"{ranks} ranks, at most {MOST} are served"
    yield from apart


def choose(order: Sums, device: torch.device, local_ranks: int, backend: str) -> tuple[Group, Route]:
    """The group of all ranks that `order` asks for. "auto": direct where nothing is against it on any rank.

    Every rank decides alike: what one of them cannot do, none does.
    Raises BlockscaleError when "direct" is ordered and cannot be, with every reason.
    """
    everyone = dist.group.WORLD
    assert everyone is not None
    if everyone.size() == 1:
        return Group(), Route("backend", "one rank")
    if order == "backend":
        return Group(everyone), Route("backend", f"{backend}: ordered")
    here = platform.detect(device)
    apart = platform.apart(here.kind, local_ranks) if here.kind == "cuda" else []
    found = list(why_not_direct(here, everyone.size(), local_ranks, apart))
    if here.kind == "cuda":
        every: list[list[str]] = [[] for _ in range(everyone.size())]
        dist.all_gather_object(every, found)
        found = list(dict.fromkeys(reason for reasons in every for reason in reasons))
    if found and order == "direct":
        raise BlockscaleError(f"sums=direct: {'; '.join(found)}")
    if found:
        return Group(everyone), Route("backend", f"{backend}: {found[0]}")
    reason = f"{everyone.size()} devices of one host reach each other's memory: no waiting for {backend}'s kernels"
    try:
        return DirectGroup(everyone, device), Route("direct", reason)
    except BlockscaleError as e:
        raise BlockscaleError(f"{e}; sums=backend leaves them to {backend}") from e
