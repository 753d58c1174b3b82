"""Several ranks for tests: processes that live for many checks, since starting one costs seconds.

They are forked from a server that has imported torch and transformers once. A check is a function of `rank_checks`,
called on every rank with the World first; what it raises on any rank fails the test with that rank's traceback.
"""

import multiprocessing
import os
import socket
import traceback

TIMEOUT = 120
"""Seconds for one check; no test waits longer for ranks that hang."""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ranks:
    """`size` processes joined by Gloo."""

    def __init__(self, size, ep=1):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "blockscale.integrations.transformers", "rank_checks"])
        self.size, self.ep, port = size, ep, free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, ep, port), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, check, *args):
        """Call `rank_checks.<check>(world, *args)` on every rank; the results by rank."""
        for pipe in self.pipes:
            pipe.send((check, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(TIMEOUT), f"rank {rank} of {self.size}: {check} did not end within {TIMEOUT} s"
            answers.append(pipe.recv())
        failed = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(pipe, rank, size, ep, port):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import rank_checks
    import torch

    from blockscale.parallel import joined

    torch.set_num_threads(1)
    with joined("cpu", ep=ep) as world:
        while (message := pipe.recv()) is not None:
            check, args = message
            try:
                pipe.send((True, getattr(rank_checks, check)(world, *args)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
