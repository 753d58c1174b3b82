"""Compile and check many configurations at once, in processes of their own: compiling is what takes the time.

A worker also fills Triton's cache for whoever times the configurations later. One that hangs or dies, as a wrong
configuration may make it, is killed; its configuration counts as wrong and another worker takes over the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ...platform import detect
from .config import Config, Wide, parse
from .selection import misfit

_START_SECONDS = 30.0  # until a worker has imported torch, with many starting at once
_SILENT_SECONDS = 45.0


def ragged_shapes(config: Config) -> Iterator[tuple[int, int, int]]:
    """(m, n, k) that a configuration is checked on: ragged rows, columns and K, several tiles, cut tiles."""
    if isinstance(config, Wide):
        rows = 64 * config.groups
        shapes = [(rows + 2, 576, 720), (200, 2112, 1024)]
        shapes += [(2 * rows, 576, 720)]  # no request for x falls short
        shapes += [(rows + 2, config.bn * 133 + 64, 720)]  # several waves: a tile leaves while the next one begins
        if config.groups == 1:  # boxes of 8, 16 and 32 rows of x; three of four boxes of 16
            shapes += [(5, 768, 2048), (12, 2112, 1024), (27, 576, 720), (48, 576, 720)]
        else:
            shapes += [(64, 768, 2048)]
    else:
        shapes = [(config.tokens // 2 + 1, 576, 720), (config.tokens, 2112, 1024), (1, 768, 2048)]
    for m, n, k in shapes:
        if not misfit(config, k):
            yield m, n, k


def check_configs(texts: list[str]) -> None:
    """Worker: a line of JSON for each configuration, [text, ""] when it is right on all its shapes.

    On the first of them with fp32 results too, as partial sums over ranks are: other staging, fewer stages.
    """
    import torch

    from .gemm import launch
    from .measure import Case, check

    sms = int(detect("cuda").value("sms") or 0)

    @cache
    def case(m: int, n: int, k: int, out: torch.dtype) -> Case:
        return Case(m, n, k, out_dtype=out)

    for text in texts:
        config, verdict = parse(text), ""
        shapes = list(ragged_shapes(config))
        for shape, out in [(shapes[0], torch.float32), *((shape, torch.bfloat16) for shape in shapes)]:
            x, w, y = case(*shape, out).operands(0)
            try:
                for early in (False, True):
                    wrong = check(launch(x, w, None, y, config, sms, early=early).run, case(*shape, out))
                    verdict = verdict or (f"{shape} {out}: {wrong}" if wrong else "")
            except Exception as e:  # a configuration that does not compile is a finding, not a crash
                verdict = f"{shape} {out}: {type(e).__name__} {str(e)[:200]}"
        print("CHECK", json.dumps([text, verdict]), flush=True)


class _Worker:
    def __init__(self, texts: list[str], command: list[str], folder: Path) -> None:
        self.texts = texts
        self.output = Path(tempfile.mkstemp(suffix=".txt", dir=folder)[1])
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [*command, ",".join(texts)], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._size, self._heard = 0, time.monotonic() + _START_SECONDS

    def silent(self) -> bool:
        size = self.output.stat().st_size
        if size != self._size:
            self._size, self._heard = size, max(self._heard, time.monotonic())
        return time.monotonic() - self._heard > _SILENT_SECONDS

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def verdicts(self) -> dict[str, str]:
        lines = self.output.read_text().splitlines()
        return dict(json.loads(line[6:]) for line in lines if line.startswith("CHECK "))


def check_all(texts: list[str], seconds: float, workers: int, command: list[str] | None = None) -> dict[str, str]:
    """The verdict on each configuration: "" for right, else what is wrong, or "not reached" within `seconds`.

    command: starts a worker; for tests.
    """
    command = command or [sys.executable, "-m", __name__]
    end = time.monotonic() + seconds
    found = dict.fromkeys(texts, "not reached")
    with tempfile.TemporaryDirectory() as folder:
        live = [_Worker(part, command, Path(folder)) for i in range(workers) if (part := texts[i::workers])]
        while live and time.monotonic() < end:
            time.sleep(0.2)
            for worker in list(live):
                silent = worker.silent()
                if worker.process.poll() is None and not silent:
                    continue
                if silent:
                    worker.kill()
                live.remove(worker)
                done = worker.verdicts()
                found |= done
                rest = [t for t in worker.texts if t not in done]
                if rest:
                    last = worker.output.read_text()[-200:]
                    found[rest[0]] = "hung" if silent else f"worker ended with {worker.process.returncode}: {last}"
                if rest[1:]:
                    live.append(_Worker(rest[1:], command, Path(folder)))
        for worker in live:
            worker.kill()
            found |= worker.verdicts()
    return found


if __name__ == "__main__":
    check_configs(sys.argv[1].split(","))
