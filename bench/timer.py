"""Timing on a GPU: CUDA graphs, operands rotated past L2, replays interleaved among implementations, medians.

A graph of several calls hides launch gaps as a serving engine's graph does. The calls of one graph walk through copies
of the operands that together exceed L2 several times, so that weights come from memory. Replays of all
implementations alternate, so that clocks, heat and neighbours hit all of them alike; report ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]


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
    for _ in range(rounds):
        for name, captured in graphs.items():
            start, end = events[name]
            start.record()
            captured.replay()
            end.record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def eager_us(call: Call, repeat: int = 20) -> float:
    """Microseconds of one call, launched one by one."""
    call()
    torch.cuda.synchronize()
    start, end = _event(), _event()
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / repeat


def ceilings() -> dict[str, float]:
    """Measured limits of this GPU: copy and read bandwidth in GB/s, bf16 matrix rate in TFLOP/s."""
    size = 1 << 30
    a = torch.empty(size, device="cuda", dtype=torch.uint8).random_()
    b = torch.empty_like(a)
    copy = eager_us(lambda: b.copy_(a))
    words = a.view(torch.float32)
    read = eager_us(lambda: torch.amax(words))
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = eager_us(lambda: m @ m)
    return {
        "copy_gb_s": 2 * size / copy / 1e3,
        "read_gb_s": size / read / 1e3,
        "bf16_tflop_s": 2 * 8192**3 / product / 1e6,
    }


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
