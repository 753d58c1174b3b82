"""Clocks for bench/parallel.py: CUDA graphs, alternating rounds, the slowest rank counts."""

from __future__ import annotations

import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from blockscale.parallel import World
from parallel_layers import Sizes


class Bench:
    """One run: sizes, clocks, and the results so far."""

    def __init__(self, world: World, sizes: Sizes, out: pathlib.Path | None, budget: float) -> None:
        self.world, self.s, self.out, self.budget = world, sizes, out, budget
        self.device, self.start = world.device, time.monotonic()
        self.gpu = self.device.type != "cpu"
        self.rows: dict[str, Any] = {}
        self.agreed: list[dict[str, Any]] = []

    def left(self) -> float:
        """Seconds, the same on every rank: rank 0's."""
        t = torch.tensor([self.budget - (time.monotonic() - self.start)], device=self.device)
        return float(self.world.tp.all_gather(t)[0])

    def say(self, *words: object) -> None:
        if self.world.speaks:
            print(f"[{time.monotonic() - self.start:6.1f}s]", *words, flush=True)

    def keep(self, key: str, value: Any) -> None:
        """Write what is known so far: a run that is cut short loses nothing."""
        self.rows[key] = value
        if self.world.speaks and self.out is not None:
            (self.out / "parallel.json").write_text(json.dumps(self.rows, indent=1))

    def us(
        self,
        calls: dict[str, Callable[[], object]],
        *,
        graphs: bool = True,
        rounds: int = 12,
        repeat: int = 1,
    ) -> dict[str, float]:
        """Median microseconds of each call over alternating rounds; every rank makes all of them, the slowest counts.

        repeat: calls in one graph, as a model has many layers: ranks do not start a graph in the same microsecond.
        """
        repeat = repeat if self.gpu and graphs else 1
        ready = {name: self._ready(call, graphs, repeat) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds if self.gpu else 2):
            for name, call in ready.items():
                self.world.tp.all_reduce(torch.zeros(1, device=self.device))
                times[name].append(self._once(call) / repeat)
        mine = torch.tensor([statistics.median(times[name]) for name in calls], device=self.device)
        slowest = self.world.tp.all_reduce(mine, "max").tolist()
        return dict(zip(calls, slowest, strict=True))

    def _ready(self, call: Callable[[], object], graphs: bool, repeat: int) -> Callable[[], object]:
        for _ in range(2):
            call()
        if not (self.gpu and graphs):
            return call
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, capture_error_mode="thread_local"):  # NCCL's watchdog asks for events
                for _ in range(repeat):
                    call()
        except RuntimeError as e:
            self.say("NOT captured, timed eagerly:", str(e).splitlines()[0])
            torch.cuda.synchronize()
            return call
        captured.replay()
        return captured.replay

    def _once(self, call: Callable[[], object]) -> float:
        if not self.gpu:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e6
        start, end = (
            torch.cuda.Event(enable_timing=True),
            torch.cuda.Event(enable_timing=True),
        )
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def show(row: dict[str, Any]) -> str:
    """One line for people."""

    def word(v: Any) -> str:
        return str(v) if not isinstance(v, float) else f"{v:.2f}" if v < 100 else f"{v:.0f}"

    return ", ".join(f"{k} {word(v)}" for k, v in row.items())
