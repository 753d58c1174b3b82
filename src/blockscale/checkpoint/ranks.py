"""One job by the ranks that torchrun started, on one machine or many with a shared folder.

Shards are divided by bytes. Every rank plans the same job from the same headers, so nothing of it travels.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from ..errors import BlockscaleError, CheckpointError
from .job import Job, Listener, Result, already_done, conclude, prepared, run_shards, tell_done, tell_start


def divide(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of `sizes` in `parts` groups of nearly equal sums: the largest first, each to the smallest group."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, i) for i in range(parts)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, i = heapq.heappop(heap)
        groups[i].append(index)
        heapq.heappush(heap, (total + sizes[index], i))
    return [sorted(group) for group in groups]


def run_rank(job: Job, listen: Listener) -> Result:
    """This rank's share. Rank 0 owns the folder: it prepares, and writes index and config last."""
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        with contextlib.ExitStack() as stack:
            finished = already_done(job)
            if finished is None:
                with _agreed("prepare"):
                    if rank == 0:
                        stack.enter_context(prepared(job))
            else:
                dist.barrier()
                if rank == 0:
                    tell_done(finished, listen)
                return finished
            share = divide([s.nbytes_in for s in job.shards], size)[rank]
            mine = [job.shards[i] for i in share]
            hear = listen if rank == 0 else lambda event: None
            tell_start(mine, hear)
            with _agreed("write"):
                kept = run_shards(job, mine, hear)
            total = torch.tensor([kept])
            dist.all_reduce(total)
            result: Result | None = None
            with _agreed("conclude"):
                if rank == 0:
                    result = conclude(job, int(total))
                    tell_done(result, listen)
            return result or Result(job.dst, False, int(total), len(job.shards), ())
    finally:
        if ours:
            dist.destroy_process_group()


@contextlib.contextmanager
def _agreed(phase: str) -> Iterator[None]:
    """All ranks leave the block together, all well or all with an error: their own, or what another rank met."""
    failure: BaseException | None = None
    try:
        yield
    except (BlockscaleError, OSError) as e:
        failure = e
    words: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(words, None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for rank, said in enumerate(words):
        if said is not None:
            raise CheckpointError(f"{phase}: rank {rank} of {len(words)}: {said}")
