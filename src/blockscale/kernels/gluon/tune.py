"""Measure which configuration is best for a shape on this card: the work of `blockscale tune`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ...errors import BlockscaleError
from ...platform import detect
from .candidates import candidates
from .config import Config, parse
from .gemm import launch
from .launch import release_graph_tickets
from .measure import Call, Case, time_calls
from .selection import by_rule, choose
from .tables import Table
from .workers import check_all

Shape = tuple[int, int, int]
"""M, N, K."""


@dataclass(frozen=True)
class Tuned:
    """What tuning found for a shape. before: the configuration until now; times in microseconds, None when it was not
    measured. faults: configurations that were wrong or did not run, and why."""

    shape: Shape
    best: str
    best_us: float
    before: str
    before_us: float | None
    faults: dict[str, str]


def tune(
    shapes: Iterable[Shape],
    device: torch.device | str = "cuda",
    *,
    workers: int = 8,
    seconds: float = 600.0,
    progress: Callable[[Tuned], None] = lambda tuned: None,
) -> list[Tuned]:
    """Measure the candidates of every shape (M, N, K), after they were compiled and checked by `workers` processes.

    seconds: for compiling and checking; what is not reached by then is not measured. The card should have nothing else
    to do. Raises BlockscaleError when the Hopper kernels do not run on the device.
    """
    platform = detect(device)
    if platform.capability != 90:
        raise BlockscaleError(f"tune: the Hopper kernels need sm_90, {device} is {platform.arch or platform.kind}")
    sms, chip = int(platform.value("sms") or 132), platform.value("chip") or ""
    plan: dict[Shape, list[Config]] = {}
    for m, n, k in shapes:
        chosen = [choose(m, n, k, sms, chip), by_rule(m, n, k, sms), *candidates(m, n, k, sms)]
        plan[m, n, k] = list(dict.fromkeys(chosen))
    verdicts = check_all(sorted({str(c) for chosen in plan.values() for c in chosen}), seconds, workers)
    found = []
    for shape, chosen in plan.items():
        good = [c for c in chosen if not verdicts[str(c)]]
        faults = {str(c): verdicts[str(c)] for c in chosen if verdicts[str(c)]}
        times, more = _times(shape, good, device, sms)
        if times:
            best, before = min(times, key=times.__getitem__), str(chosen[0])
            tuned = Tuned(shape, best, times[best], before, times.get(before), faults | more)
            found.append(tuned)
            progress(tuned)
    return found


def table(found: Iterable[Tuned]) -> Table:
    """The rows of a card's table."""
    rows: Table = {}
    for tuned in found:
        m, n, k = tuned.shape
        parse(tuned.best)
        rows.setdefault(f"{n}x{k}", {})[str(m)] = tuned.best
    return rows


def _times(
    shape: Shape, configs: list[Config], device: torch.device | str, sms: int
) -> tuple[dict[str, float], dict[str, str]]:
    case = Case(*shape, device)

    def bind(config: Config, i: int) -> Call:
        x, w, y = case.operands(i)
        return lambda: launch(x, w, None, y, config, sms, early=True).run()

    calls = {str(c): [bind(c, i) for i in range(case.copies)] for c in configs}
    result = time_calls(case, calls, 9 if case.m < 2048 else 5)
    release_graph_tickets()
    return result
