"""Is a configuration right, and how fast is it: what `blockscale tune` and bench/gemm.py stand on.

Nothing is timed before it is right: results go into outputs full of NaN, are compared row by row with fp64 products of
the dequantized operands, and must be the same bytes each time. Timing replays CUDA graphs of several calls that walk
through copies of the operands, so that weights come from memory; replays of all candidates alternate, so that clocks
and heat hit them alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ... import reference
from ...formats import get_format
from ...layouts import convert
from ...tensor import BlockScaled

Call = Callable[[], object]
WORST_ROW = 6e-3  # relative error of a bf16 row: rounding of the result is 1.7e-3, the rest is wgmma's fp8 sum
ROTATE_BYTES = 256e6  # operands of one graph: several times L2
_CHECKED_ROWS = 96


class Case:
    """Operands of one shape, in as many copies as it takes to leave L2. m, n, k: rows of x, rows and columns of w."""

    def __init__(
        self, m: int, n: int, k: int, device: torch.device | str = "cuda", seed: int = 0,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.m, self.n, self.k = m, n, k
        random = torch.Generator(device=device).manual_seed(seed + m + 7 * n + 31 * k)
        w = _varied(n, k, random) * 0.05
        x = _varied(m, k, random)
        self.w = reference.quantize(w, get_format("fp8_128x128"))
        self.x = convert(reference.quantize(x, get_format("fp8_1x128")), "tma")
        size = n * k + m * k + out_dtype.itemsize * m * n
        self.copies = max(1, min(32, math.ceil(ROTATE_BYTES / size)))
        self.ws = [self.w, *(_clone(self.w) for _ in range(self.copies - 1))]
        self.xs = [self.x, *(_clone(self.x) for _ in range(min(self.copies, 4) - 1))]
        self.ys = [torch.empty(m, n, device=device, dtype=out_dtype) for _ in self.xs]
        rows = torch.arange(m, device=device)
        if m > _CHECKED_ROWS:
            inner = torch.randint(0, m, (_CHECKED_ROWS - 8,), device=device, generator=random)
            rows = torch.cat([rows[:4], rows[-4:], inner])
        self.rows = rows
        self.want = reference.matmul(_take(self.x, rows), self.w, torch.float64)

    def operands(self, i: int) -> tuple[BlockScaled, BlockScaled, Tensor]:
        """x, w and y of copy i; copies come round again."""
        return self.xs[i % len(self.xs)], self.ws[i % len(self.ws)], self.ys[i % len(self.ys)]

    @property
    def calls(self) -> int:
        """Calls that one graph should hold: through all copies, and some 250 us of work."""
        floor_us = self.n * self.k / 4.2e6 + 2.0 * self.m * self.n * self.k / 1.3e9
        return max(self.copies, min(20, math.ceil(250 / floor_us)))

    def worst_row(self, y: Tensor) -> float:
        """Largest relative error of a row; NaN when anything was left unwritten."""
        if not torch.isfinite(y).all():
            return math.nan
        error = (y[self.rows].double() - self.want).norm(dim=1) / self.want.norm(dim=1)
        return float(error.max())


def _varied(rows: int, cols: int, random: torch.Generator) -> Tensor:
    """Normal numbers whose blocks differ in magnitude, so that a wrong scale shows."""
    x = torch.randn(rows, cols, device=random.device, generator=random)
    level = torch.rand(-(-rows // 128), -(-cols // 128), device=random.device, generator=random) * 1.5 + 0.25
    return x * level.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]


def _clone(t: BlockScaled) -> BlockScaled:
    return replace(t, data=t.data.clone(), scale=t.scale.clone())


def _take(x: BlockScaled, rows: Tensor) -> BlockScaled:
    row = convert(x, "row")
    data = row.data.view(torch.uint8)[rows].view(row.data.dtype)
    return replace(row, data=data, scale=row.scale[rows].contiguous(), shape=(len(rows), row.shape[1]))


def check(run: Call, case: Case) -> str:
    """Why the result of `run` (into the case's first y, or returned) is wrong or not always the same; "" when it is."""
    y = case.ys[0]
    outputs = []
    for _ in range(3):
        y.fill_(math.nan)
        got = run()
        torch.cuda.synchronize()
        outputs.append((got if isinstance(got, Tensor) else y).clone())
    error = case.worst_row(outputs[0])
    if not error < WORST_ROW:
        return f"worst row {error:.2e}"
    return "" if all(torch.equal(outputs[0], other) for other in outputs) else "runs differ"


def check_replay(captured: torch.cuda.CUDAGraph, case: Case) -> str:
    """Replayed back to back, launches overlap (programmatic dependent launch): every output must still be right."""
    for y in case.ys:
        y.fill_(math.nan)
    captured.replay()
    captured.replay()
    torch.cuda.synchronize()
    wrong = [error for y in case.ys if not (error := case.worst_row(y)) < WORST_ROW]
    return f"replay: worst row {wrong[0]:.2e}" if wrong else ""


def graph(calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
    """Capture `count` calls, walking round `calls` (one for each copy of the operands)."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for i in range(count):
            calls[i % len(calls)]()
    return captured


def interleaved(graphs: Mapping[str, torch.cuda.CUDAGraph], calls: int, rounds: int) -> dict[str, float]:
    """Median microseconds of one call of each graph. calls: calls that every graph holds."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    events = {name: (_event(), _event()) for name in graphs}
    for captured in graphs.values():
        captured.replay()
    torch.cuda.synchronize()
    names = list(graphs)
    for turn in range(rounds):
        # on an idle GPU the first one's time would hold the host's time to launch it: something runs before it. Each
        # turn begins with another one: after an idle moment clocks are higher
        order = names[turn % len(names) :] + names[: turn % len(names)]
        graphs[order[-1]].replay()
        for name in order:
            start, end = events[name]
            start.record()
            graphs[name].replay()
            end.record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def time_calls(
    case: Case, calls: Mapping[str, Sequence[Call]], rounds: int, replayed: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, float], dict[str, str]]:
    """(microseconds, faults) by name. calls: one for each copy of the operands. replayed: whose graphs are checked too.

    What is wrong, or raises, is a fault and gets no time.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    faults: dict[str, str] = {}
    for name, bound in calls.items():
        try:
            wrong = check(bound[0], case)
            if not wrong:
                captured = graph(bound, case.calls)
                wrong = check_replay(captured, case) if replayed(name) else ""
            if wrong:
                faults[name] = wrong
            else:
                graphs[name] = captured
        except Exception as e:  # a configuration that does not compile or launch is a finding, not a crash
            faults[name] = f"{type(e).__name__} {str(e)[:200]}"
    times = interleaved(graphs, case.calls, rounds) if graphs else {}
    graphs.clear()
    return times, faults


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
