"""Eager calls of one layer from many streams, threads and graphs at once: every result must be the same bytes.

    python bench/streams.py

Streams of torch (more than its pool holds, so that handles come round again), streams of another library that are made
and destroyed between calls, threads that share a stream and threads with streams of their own, captured graphs that are
replayed beside eager calls. What goes wrong when two calls share scratch memory or tickets is a wrong result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from blockscale import ops, quantize
from blockscale.tensor import BlockScaled

Check = Callable[["Layer"], int]
ROUNDS = 6


class Layer:
    """A weight, inputs of every regime, and what each gives on the default stream."""

    def __init__(self, n: int, k: int) -> None:
        self.w: BlockScaled = quantize(torch.randn(n, k, device="cuda") * 0.05, "fp8_128x128")
        self.xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for m in (1, 7, 16, 40, 64, 100, 300) * 2]
        self.want = [ops.linear(x, self.w) for x in self.xs]
        torch.cuda.synchronize()

    def call(self, i: int) -> Tensor:
        return ops.linear(self.xs[i % len(self.xs)], self.w)

    def wrong(self, results: list[tuple[int, Tensor]]) -> int:
        """How many are not the same bytes."""
        torch.cuda.synchronize()
        return sum(not torch.equal(y, self.want[i % len(self.want)]) for i, y in results)


def torch_streams(layer: Layer) -> tuple[int, int]:
    """(results, wrong ones) of 80 streams: torch's pool has 32."""
    results = []
    for s in range(80):
        with torch.cuda.stream(torch.cuda.Stream()):
            results += [(s + r, layer.call(s + r)) for r in range(ROUNDS)]
    return len(results), layer.wrong(results)


def foreign_streams(layer: Layer) -> tuple[int, int]:
    """The same with streams that are not torch's, destroyed while their kernels run; says how many handles recurred."""
    driver = ctypes.CDLL("libcuda.so.1")
    results, handles = [], []
    for s in range(40):
        handle = ctypes.c_void_p()
        assert driver.cuStreamCreate(ctypes.byref(handle), 1) == 0
        handles.append(handle.value)
        with torch.cuda.stream(torch.cuda.ExternalStream(handle.value or 0)):
            results += [(s + r, layer.call(s + r)) for r in range(ROUNDS)]
        assert driver.cuStreamDestroy_v2(handle) == 0
    print(f"  {len(handles) - len(set(handles))} of {len(handles)} handles recurred")
    return len(results), layer.wrong(results)


def threads(layer: Layer, own: bool) -> tuple[int, int]:
    """Eight threads at once, on one stream or each on its own."""
    shared = torch.cuda.Stream()

    def work(t: int) -> list[tuple[int, Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream() if own else shared):
            return [(t + r, layer.call(t + r)) for r in range(5 * ROUNDS)]

    with ThreadPoolExecutor(8) as pool:
        results = [pair for part in pool.map(work, range(8)) for pair in part]
    return len(results), layer.wrong(results)


def graphs(layer: Layer) -> tuple[int, int]:
    """Graphs replayed on streams of their own beside eager calls on another."""
    captured = []
    for i in range(6):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer.call(i)
        captured.append((graph, torch.cuda.Stream(), i, y))
    results = []
    for r in range(5 * ROUNDS):
        for graph, stream, _, _ in captured:
            with torch.cuda.stream(stream):
                graph.replay()
        results.append((r, layer.call(r)))
    results += [(i, y) for _, _, i, y in captured]
    return len(results), layer.wrong(results)


def main() -> None:
    for n, k in ((1536, 7168), (2112, 1024)):
        layer = Layer(n, k)
        checks = {
            "torch's streams": torch_streams(layer),
            "foreign streams": foreign_streams(layer),
            "threads, one stream": threads(layer, own=False),
            "threads, own streams": threads(layer, own=True),
            "graphs beside eager calls": graphs(layer),
        }
        for name, (count, wrong) in checks.items():
            print(f"{n}x{k} {name}: {count} results, {wrong} wrong", flush=True)
        if any(wrong for _, wrong in checks.values()):
            raise SystemExit(1)


if __name__ == "__main__":
    with torch.no_grad():
        main()
