"""Several ranks for tests: processes that live for many checks, since starting one costs seconds.

They are forked from a server that has imported torch and transformers once. A check is a function of `rank_checks`,
called on every rank with the World first; what it raises on any rank fails the test with that rank's traceback.
"""

import multiprocessing
import os
import socket
import time
import traceback

TIMEOUT = 60
"""Seconds for one check; no test waits longer for ranks that hang."""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ranks:
    """`size` processes joined by Gloo. After a check that failed they start anew: some may be stuck in a collective."""

    def __init__(self, size, ep=1):
        self.size, self.ep, self.pipes, self.processes = size, ep, [], []

    def start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "blockscale.integrations.transformers", "rank_checks"])
        port = free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, self.ep, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, check, *args, **options):
        """Call `rank_checks.<check>(world, *args, **options)` on every rank; the results by rank."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((check, args, options))
        deadline, answers = time.monotonic() + TIMEOUT, []
        for pipe in self.pipes:
            try:
                ready = pipe.poll(max(0.1, deadline - time.monotonic()))
                answers.append(pipe.recv() if ready else (False, f"no answer within {TIMEOUT} s"))
            except EOFError:
                answers.append((False, "the process ended"))
            if not answers[-1][0]:
                deadline = min(deadline, time.monotonic() + 5)
        failed = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failed:
            self.kill()
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []


def _serve(pipe, rank, size, ep, port):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import rank_checks
    import torch
    import transformers

    from blockscale.parallel import joined

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with joined("cpu", ep=ep) as world:
        while (message := pipe.recv()) is not None:
            check, args, options = message
            try:
                pipe.send((True, getattr(rank_checks, check)(world, *args, **options)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
