"""The suite over several processes: one thread here for each, a process that dies is a failure and is replaced."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from .cases import Case
from .report import Failure, Report

ANSWER_SECONDS = 300.0
"""Longest that one kernel may take on one case, compiling included."""


class Died(Exception):
    """The process ended, or did not answer in time, while it tried `kernel` ("" before the first)."""

    def __init__(self, kernel: str, how: str) -> None:
        super().__init__(how)
        self.kernel, self.how = kernel, how


class Process:
    """One worker process."""

    def __init__(self, device: str, threads: int) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "blockscale.conformance.worker", device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "BLOCKSCALE_WORKER_THREADS": str(threads)},
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, case: Case, kernel: str | None, skip: list[str]) -> Iterable[dict[str, Any]]:
        """Results as they come. Raises Died."""
        assert self._child.stdin is not None
        at = ""
        try:
            self._child.stdin.write(json.dumps({"case": case.to_json(), "kernel": kernel, "skip": skip}) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise Died(at, self._ending()) from None
        while True:
            try:
                line = self._lines.get(timeout=ANSWER_SECONDS)
            except queue.Empty:
                raise Died(at, f"no answer in {ANSWER_SECONDS:.0f} s") from None
            if not line:
                raise Died(at, self._ending())
            answer = json.loads(line)
            at = answer.get("at", at)
            if "kernel" in answer:
                yield answer
            elif answer.get("done"):
                if answer["lost"]:
                    raise Died("", "the device no longer answers")
                return

    def _ending(self) -> str:
        code = self._child.wait()
        return f"the process died of signal {-code}" if code < 0 else f"the process ended with status {code}"

    def stop(self) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()


def run_sharded(
    report: Report, cases: list[Case], device: str, kernel: str | None, workers: int, seconds: float | None
) -> None:
    """Fill `report`. Cases that share compiled code follow one another in one process, so that each compiles it once.

    seconds: start no case after that; those left are counted as untried.
    """
    batches: queue.SimpleQueue[list[Case]] = queue.SimpleQueue()
    for _, group in groupby(cases, key=lambda c: (c.op, c.format, c.numerics)):
        batches.put(list(group))
    deadline = None if seconds is None else time.monotonic() + seconds
    lock = threading.Lock()
    threads = max(1, (os.cpu_count() or 1) // workers)
    errors: list[BaseException] = []

    def serve() -> None:
        process = Process(device, threads)
        try:
            while True:
                for case in batches.get_nowait():
                    if deadline is not None and time.monotonic() > deadline:
                        with lock:
                            report.untried += 1
                        continue
                    process = _try(process, case, report, lock, device, kernel, threads)
        except queue.Empty:
            return
        except BaseException as e:
            errors.append(e)
        finally:
            process.stop()

    pool = [threading.Thread(target=serve) for _ in range(workers)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if errors:
        raise errors[0]


def _try(
    process: Process, case: Case, report: Report, lock: threading.Lock, device: str, kernel: str | None, threads: int
) -> Process:
    """One case; returns the process that goes on, another one when it died."""
    tried: list[str] = []
    while True:
        try:
            for answer in process.ask(case, kernel, tried):
                tried.append(answer["kernel"])
                failure = Failure(**answer["failure"]) if answer["failure"] else None
                with lock:
                    report.add(answer["kernel"], str(case), failure, answer["error"], answer["row_error"])
            return process
        except Died as died:
            process.stop()
            process = Process(device, threads)
            if died.kernel in tried:
                continue
            if not died.kernel and not tried:
                raise RuntimeError(f"a worker for {device} cannot start: {died.how}") from died
            if died.kernel:
                tried.append(died.kernel)
                failure = Failure(died.kernel, str(case), None, died.how, "a result", "raised", case.op)
                with lock:
                    report.add(died.kernel, str(case), failure, float("inf"))
