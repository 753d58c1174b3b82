"""One job by many processes: workers on one machine, or ranks under torchrun on many.

Shards are handed to workers as they become free, and divided by bytes among ranks. Every process plans the same job
from the same headers, so only shard numbers travel.
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
from .job import Job, Listener, Result, already_done, conclude, prepared, run_job, run_shards, tell_start
from .report import error_summary, left_alone
from .shards import Shard

Planner = Callable[[Path, Path, Any], Job]
"""(source, destination, options) -> Job; a module-level function, the same in every process."""

_KINDS: Mapping[str, type[Exception]] = {
    kind.__name__: kind for kind in (CheckpointError, DestinationError, InexactError, NotFiniteError, BlockscaleError)
}


def carry_out(planner: Planner, src: Path, dst: Path, options: Any, workers: int, listen: Listener) -> Result:
    """Plan and run a job: under torchrun with its ranks, otherwise with `workers` processes.

    The last event is {"event": "done", path, existed, shards, kept, tensors, and of what was measured: measured,
    mean_relative_error, max_relative_error, worst; left: names of what one would expect to be quantized, and is not}.
    Raises what the job raises, from whichever process.
    """
    if workers < 1:
        raise BlockscaleError(f"workers: needs at least 1, got {workers}")
    job = planner(src, dst, options)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _run_rank(job, listen)
    workers = min(workers, len(job.shards))
    if workers == 1:
        result = run_job(job, listen)
    elif finished := already_done(job):
        result = finished
    else:
        with prepared(job):
            result = conclude(job, _run_workers(job, planner, options, workers, listen))
    _tell_done(result, listen)
    return result


def _tell_done(result: Result, listen: Listener) -> None:
    said = {"path": str(result.path), "existed": result.existed, "shards": result.shards, "kept": result.kept}
    listen(
        {
            "event": "done",
            **said,
            "tensors": len(result.records),
            **error_summary(result.records),
            "left": [left["name"] for left in left_alone(result.records)],
        }
    )


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
    """This process works too: it has torch imported already, and the others take seconds to start."""
    tell_start(job.shards, listen)
    threads = torch.get_num_threads()
    team = _Team(job, planner, options, workers - 1, max(1, threads // workers), listen)
    try:
        torch.set_num_threads(max(1, threads // workers))
        kept = run_shards(job, (job.shards[i] for i in team.shares()), team.hear)
        return kept + team.join()
    finally:
        team.end()
        torch.set_num_threads(threads)


class _Team:
    """Spawned workers, and the thread that hands them shards and hears what they say.

    Shards are handed out one by one, the largest first, to whoever is free. The first failure stops all: it is raised
    in the thread that works here, at its next event.
    """

    def __init__(self, job: Job, planner: Planner, options: Any, count: int, threads: int, listen: Listener) -> None:
        self._left = sorted(range(len(job.shards)), key=lambda i: (job.shards[i].nbytes_in, -i))  # taken from the end
        self._listen, self._lock = listen, threading.Lock()
        self._failure: Exception | None = None
        self._kept = 0
        context = multiprocessing.get_context("spawn")
        self._running: dict[Connection, BaseProcess] = {}
        for _ in range(count):
            ours, theirs = context.Pipe()
            args = (planner, job.source, job.dst, options, threads, theirs)
            process: BaseProcess = context.Process(target=_work, args=args)
            process.start()
            theirs.close()  # so that the end of the worker is the end of the pipe
            self._running[ours] = process
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def shares(self) -> Iterator[int]:
        """Numbers of the shards that this process shall make. Raises what a worker raised."""
        while (index := self._take()) is not None:
            yield index

    def hear(self, event: Mapping[str, Any]) -> None:
        """A listener for the work of this process. Raises what a worker raised."""
        if self._failure is not None:
            raise self._failure
        with self._lock:
            self._listen(event)

    def join(self) -> int:
        """Wait until all are done. Returns how many shards the workers kept. Raises what a worker raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._kept

    def end(self) -> None:
        """End the workers, whatever they do."""
        for process in self._running.values():
            process.terminate()
            process.join()
        self._thread.join()

    def _take(self) -> int | None:
        with self._lock:
            return self._left.pop() if self._left and self._failure is None else None

    def _serve(self) -> None:
        try:
            self._serve_all()
        except Exception as e:  # of a listener too; raised by `hear` or `join`
            self._failure = e

    def _serve_all(self) -> None:
        open_pipes = set(self._running)
        while open_pipes:
            for pipe in wait(list(open_pipes)):
                assert isinstance(pipe, Connection)
                try:
                    message: dict[str, Any] = pipe.recv()
                except (EOFError, OSError):
                    process = self._running[pipe]
                    process.join()
                    raise CheckpointError(f"a worker died (exit code {process.exitcode}); run again to go on") from None
                if message["event"] == "next":
                    pipe.send(self._take())
                elif message["event"] == "finished":
                    self._kept += message["kept"]
                    open_pipes.discard(pipe)
                elif message["event"] == "error":
                    raise _error_of(message)
                else:
                    with self._lock:
                        self._listen(message)


def _error_of(message: Mapping[str, Any]) -> Exception:
    """What a worker raised, as it would have been raised here."""
    if message["errno"] is not None:
        return OSError(message["errno"], message["text"], message["file"])
    return _KINDS.get(message["kind"], CheckpointError)(message["text"])


def _work(planner: Planner, src: Path, dst: Path, options: Any, threads: int, pipe: Connection) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _end_with_parent()
    torch.set_num_threads(threads)

    def shares(job: Job) -> Iterator[Shard]:
        while True:
            pipe.send({"event": "next"})
            index = pipe.recv()
            if index is None:
                return
            yield job.shards[index]

    try:
        job = planner(src, dst, options)
        kept = run_shards(job, shares(job), lambda event: pipe.send(dict(event)))
        pipe.send({"event": "finished", "kept": kept})
    except (EOFError, BrokenPipeError):
        os._exit(1)  # the parent is gone
    except OSError as e:
        text = e.strerror or str(e)
        pipe.send({"event": "error", "kind": "OSError", "errno": e.errno or 5, "text": text, "file": e.filename})
    except BlockscaleError as e:
        pipe.send({"event": "error", "kind": type(e).__name__, "errno": None, "text": str(e)})


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
                if rank == 0:
                    _tell_done(finished, listen)
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
                    _tell_done(result, listen)
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
