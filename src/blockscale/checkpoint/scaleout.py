"""One job by many processes: workers of one machine here, the ranks of torchrun in `ranks`.

Shards are handed to workers as they become free. Every process plans the same job from the same headers, so only shard
numbers travel.
Workers are spawned, not forked (threads of torch do not survive a fork), and end with their parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ..errors import BlockscaleError, CheckpointError
from .errors import DestinationError, InexactError, NotFiniteError
from .job import Job, Listener, Result, already_done, conclude, prepared, run_job, run_shards, tell_done, tell_start
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
        from .ranks import run_rank  # torch.distributed takes its time to import

        return run_rank(job, listen)
    workers = min(workers, len(job.shards))
    if workers == 1:
        result = run_job(job, listen)
    elif finished := already_done(job):
        result = finished
    else:
        with prepared(job):
            result = conclude(job, _run_workers(job, planner, options, workers, listen))
    tell_done(result, listen)
    return result


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
            with _without_interrupts():
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


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """What starts here never sees Ctrl-C: the parent decides, also while a worker still imports torch. One that comes
    meanwhile waits for the end of the block."""
    resource_tracker.ensure_running()  # else the first start does this, and lets interrupts through again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _error_of(message: Mapping[str, Any]) -> Exception:
    """What a worker raised, as it would have been raised here."""
    if message["errno"] is not None:
        return OSError(message["errno"], message["text"], message["file"])
    return _KINDS.get(message["kind"], CheckpointError)(message["text"])


def _work(planner: Planner, src: Path, dst: Path, options: Any, threads: int, pipe: Connection) -> None:
    """A worker's life."""
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
