"""One job by many processes: workers on one machine, or ranks under torchrun on many.

Shards are divided by bytes. Every process plans the same job from the same headers, so only shard numbers travel.
Workers are spawned, not forked (threads of torch do not survive a fork), and end with their parent.
"""

from __future__ import annotations

import contextlib
import heapq
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ..errors import BlockscaleError, CheckpointError
from .errors import DestinationError, InexactError, NotFiniteError
from .job import Job, Listener, Result, already_done, conclude, prepared, run_job, run_shards

Planner = Callable[[Path, Path, Any], Job]
"""(source, destination, options) -> Job; a module-level function, the same in every process."""

_KINDS: Mapping[str, type[Exception]] = {
    kind.__name__: kind for kind in (CheckpointError, DestinationError, InexactError, NotFiniteError, BlockscaleError)
}


def carry_out(planner: Planner, src: Path, dst: Path, options: Any, workers: int, listen: Listener) -> Result:
    """Plan and run a job: under torchrun with its ranks, otherwise with `workers` processes.

    Raises what the job raises, from whichever process.
    """
    if workers < 1:
        raise BlockscaleError(f"workers: needs at least 1, got {workers}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _run_rank(planner(src, dst, options), listen)
    job = planner(src, dst, options)
    workers = min(workers, len(job.shards))
    if workers == 1:
        return run_job(job, listen)
    if finished := already_done(job):
        return finished
    with prepared(job):
        kept = _run_workers(job, planner, options, workers, listen)
        return conclude(job, kept, listen)


def divide(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of `sizes` in `parts` groups of nearly equal sums: the largest first, each to the smallest group."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, i) for i in range(parts)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, i = heapq.heappop(heap)
        groups[i].append(index)
        heapq.heappush(heap, (total + sizes[index], i))
    return [sorted(group) for group in groups]


# -- workers of one machine --------------------------------------------------------------------------------------


def _run_workers(job: Job, planner: Planner, options: Any, workers: int, listen: Listener) -> int:
    listen({"event": "start", "shards": len(job.shards), "bytes": sum(s.nbytes_in for s in job.shards)})
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    running: dict[Connection, BaseProcess] = {}
    for share in divide([s.nbytes_in for s in job.shards], workers):
        receive, send = context.Pipe(duplex=False)
        args = (planner, job.source, job.dst, options, share, threads, send)
        process: BaseProcess = context.Process(target=_work, args=args)
        process.start()
        send.close()  # so that the end of the worker is the end of the pipe
        running[receive] = process
    kept = 0
    try:
        for message in _messages(running):
            if message["event"] == "kept":
                kept += message["count"]
            elif message["event"] != "start":
                listen(message)
    finally:
        for process in running.values():
            process.terminate()
            process.join()
    return kept


def _messages(running: dict[Connection, BaseProcess]) -> Iterator[dict[str, Any]]:
    """Events of all workers until each has said "finished". Raises what a worker raised, or that it died."""
    open_pipes = set(running)
    while open_pipes:
        for pipe in wait(list(open_pipes)):
            assert isinstance(pipe, Connection)
            try:
                message: dict[str, Any] = pipe.recv()
            except EOFError:
                process = running[pipe]
                process.join()
                raise CheckpointError(f"a worker died (exit code {process.exitcode}); run again to go on") from None
            if message["event"] == "finished":
                open_pipes.discard(pipe)
            elif message["event"] == "error":
                if message["errno"] is not None:
                    raise OSError(message["errno"], message["text"], message["file"])
                raise _KINDS.get(message["kind"], CheckpointError)(message["text"])
            else:
                yield message


def _work(
    planner: Planner, src: Path, dst: Path, options: Any, share: Sequence[int], threads: int, send: Connection
) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _end_with_parent()
    torch.set_num_threads(threads)
    try:
        job = planner(src, dst, options)
        kept = run_shards(job, [job.shards[i] for i in share], lambda event: send.send(dict(event)))
        send.send({"event": "kept", "count": kept})
        send.send({"event": "finished"})
    except OSError as e:
        text = e.strerror or str(e)
        send.send({"event": "error", "kind": "OSError", "errno": e.errno or 5, "text": text, "file": e.filename})
    except BlockscaleError as e:
        send.send({"event": "error", "kind": type(e).__name__, "errno": None, "text": str(e)})


def _end_with_parent() -> None:
    """An orphan must not go on writing where the next run writes."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


# -- ranks under torchrun ----------------------------------------------------------------------------------------


def _run_rank(job: Job, listen: Listener) -> Result:
    """This rank's share. Rank 0 owns the folder: it prepares, and writes index and config last."""
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        with contextlib.ExitStack() as stack:
            finished = already_done(job)
            if rank == 0 and finished is None:
                with _agreed("prepare"):
                    stack.enter_context(prepared(job))
            elif finished is None:
                with _agreed("prepare"):
                    pass
            if finished is not None:
                dist.barrier()
                return finished
            share = divide([s.nbytes_in for s in job.shards], size)[rank]
            with _agreed("write"):
                kept = run_shards(job, [job.shards[i] for i in share], listen if rank == 0 else lambda event: None)
            total = torch.tensor([kept])
            dist.all_reduce(total)
            result: Result | None = None
            with _agreed("conclude"):
                if rank == 0:
                    result = conclude(job, int(total), listen)
            return result or Result(job.dst, False, int(total), len(job.shards), ())
    finally:
        if ours:
            dist.destroy_process_group()


@contextlib.contextmanager
def _agreed(phase: str) -> Iterator[None]:
    """All ranks leave the block together, all well or all with an error."""
    import torch.distributed as dist

    failure: BaseException | None = None
    try:
        yield
    except (BlockscaleError, OSError) as e:
        failure = e
    failed = torch.tensor([0 if failure is None else 1])
    dist.all_reduce(failed)
    if failure is not None:
        raise failure
    if int(failed):
        raise CheckpointError(f"{phase}: another rank failed; its message says why")
