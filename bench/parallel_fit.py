"""A small model of spread layers, fitted to measurements on two ranks, and what it says about more ranks.

    compute(n) = a + b / n            from one rank (n = 1) and the same work's share (n = 2), traffic left out
    traffic(n) = latency * steps(n) + bytes(n) / bandwidth

with `steps` and `bytes` of a ring: a reduce-scatter or an all-gather of S bytes takes n - 1 steps and moves S (n-1)/n.
Latency and bandwidth are fitted by least squares to collectives of several sizes on two ranks. It is a projection, not
a measurement: it takes every link to be as fast as the measured one, unless another bandwidth is given for ranks beyond
one host, and overlaps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

HOST = 8
"""GPUs that one host's NVLink joins."""


@dataclass(frozen=True)
class Link:
    """latency_us: of one step. bytes_per_us: bandwidth of one rank, one direction."""

    latency_us: float
    bytes_per_us: float

    def ring_us(self, size: float, ranks: int, passes: int = 1) -> float:
        """Reduce-scatter or all-gather (1 pass), all-reduce (2) of `size` bytes."""
        if ranks == 1:
            return 0.0
        return passes * ((ranks - 1) * self.latency_us + size * (ranks - 1) / ranks / self.bytes_per_us)


def fit_link(samples: list[tuple[float, float]], ranks: int, passes: int) -> Link:
    """samples: (bytes, microseconds) of a collective. Relative least squares, so that small sizes count too."""
    rows = [((passes * (ranks - 1)) / t, passes * size * (ranks - 1) / ranks / t) for size, t in samples]
    aa = sum(a * a for a, _ in rows)
    ab = sum(a * b for a, b in rows)
    bb = sum(b * b for _, b in rows)
    sa, sb = sum(a for a, _ in rows), sum(b for _, b in rows)
    det = aa * bb - ab * ab
    latency, slope = (sa * bb - sb * ab) / det, (sb * aa - sa * ab) / det
    return Link(max(latency, 0.0), 1 / slope)


@dataclass(frozen=True)
class Layer:
    """one_us: on one rank. half_us: a rank's compute on two. traffic: (bytes, passes) of each collective."""

    name: str
    one_us: float
    half_us: float
    traffic: tuple[tuple[float, int], ...]

    def compute_us(self, ranks: int) -> float:
        share = 2 * (self.one_us - self.half_us)
        return max(self.one_us - share, 0.0) + share / ranks if share > 0 else self.one_us

    def project(self, ranks: int, link: Link, between: Link | None = None) -> tuple[float, float, float]:
        """(compute, traffic, speed-up over one rank). between: the link of ranks beyond one host."""
        used = link if ranks <= HOST or between is None else between
        traffic = sum(used.ring_us(size, ranks, passes) for size, passes in self.traffic)
        compute = self.compute_us(ranks)
        return compute, traffic, self.one_us / (compute + traffic)
