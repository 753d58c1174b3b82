"""A small model of spread layers, fitted to measurements on two ranks, and what it says about more ranks.

    compute(n) = a + b / n               from one rank (n = 1) and the same work's share (n = 2), traffic left out

and for each sum of S bytes of fp32 addends over n ranks

    one host, few tokens                 latency + (n - 1) S / pushed      one kernel, which pushes to each other rank
    one host, many tokens                max(0, S (n - 1) / n / copied - compute(n) / 2) + additions + barriers
    h hosts of 8                         the sum within a host, its latency once more, and a ring of each GPU with its
                                         h - 1 fellows for an eighth: 2 ((h - 1) step + S / 8 (h - 1) / h / wire)

`latency`, `pushed`, `copied` and the additions are measured on two ranks of one host (`parallel_direct`); `step` and
`wire` between hosts are assumed, and nothing hides what travels there. A projection, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

HOST = 8
"""GPUs that one host's NVLink joins."""
FEW = 1 << 22
"""Bytes of a sum that one kernel does."""


@dataclass(frozen=True)
class Link:
    """Of a ring. latency_us: of one step. bytes_per_us: bandwidth of one rank, one direction."""

    latency_us: float
    bytes_per_us: float

    def all_reduce_us(self, size: float, ranks: int) -> float:
        return 2 * ((ranks - 1) * self.latency_us + size * (ranks - 1) / ranks / self.bytes_per_us)


@dataclass(frozen=True)
class Direct:
    """Shared memory. latency_us, bytes_per_us: of small sums. copied: bytes a microsecond of a copy engine.

    add_us: adding what arrived from one other rank to half of the rows.
    """

    latency_us: float
    bytes_per_us: float
    copied: float
    add_us: float

    def sum_us(self, size: float, ranks: int, compute_us: float) -> float:
        """compute_us: of the rank, half of which may hide copies."""
        if size <= FEW:
            return self.latency_us + (ranks - 1) * size / self.bytes_per_us
        hidden = max(0.0, size * (ranks - 1) / ranks / self.copied - compute_us / 2)
        addition = self.add_us * (ranks + 0.5) / ranks / 1.25  # reads n addends of its rows, writes half as much
        return hidden + addition + 2 * self.latency_us


def fit_line(samples: list[tuple[float, float]], per_latency: float, per_byte: float) -> tuple[float, float]:
    """(latency, bytes a microsecond) of `t = per_latency * latency + per_byte * size / rate`.

    samples: (bytes, microseconds). Relative least squares, so that small sizes count too.
    """
    rows = [(per_latency / t, per_byte * size / t) for size, t in samples]
    aa = sum(a * a for a, _ in rows)
    ab = sum(a * b for a, b in rows)
    bb = sum(b * b for _, b in rows)
    sa, sb = sum(a for a, _ in rows), sum(b for _, b in rows)
    det = aa * bb - ab * ab
    latency, slope = (sa * bb - sb * ab) / det, (sb * aa - sa * ab) / det
    return max(latency, 0.0), 1 / slope


def fit_link(samples: list[tuple[float, float]], ranks: int) -> Link:
    """Of all-reduces."""
    return Link(*fit_line(samples, 2 * (ranks - 1), 2 * (ranks - 1) / ranks))


def fit_direct(samples: list[tuple[float, float]], ranks: int) -> Link:
    """Of small sums through shared memory: latency and bytes a microsecond to one other rank."""
    return Link(*fit_line(samples, 1, ranks - 1))


@dataclass(frozen=True)
class Layer:
    """one_us: on one rank. half_us: a rank's compute on two. sums: bytes of fp32 addends of each sum over ranks."""

    name: str
    one_us: float
    half_us: float
    sums: tuple[float, ...]

    def compute_us(self, ranks: int) -> float:
        share = 2 * (self.one_us - self.half_us)
        return max(self.one_us - share, 0.0) + share / ranks if share > 0 else self.one_us

    def project(self, ranks: int, direct: Direct | None, between: Link) -> tuple[float, float, float]:
        """(compute, traffic that nothing hides, speed-up over one rank). between: of a ring; of hosts, where direct."""
        compute, inside = self.compute_us(ranks), min(ranks, HOST)
        if direct is None:
            traffic = sum(between.all_reduce_us(size, ranks) for size in self.sums)
            return compute, traffic, self.one_us / (compute + traffic)
        traffic = sum(direct.sum_us(size, inside, compute / len(self.sums)) for size in self.sums)
        if ranks > HOST:
            over = [between.all_reduce_us(size / HOST, ranks // HOST) for size in self.sums]
            traffic += sum(over) + len(over) * direct.latency_us
        return compute, traffic, self.one_us / (compute + traffic)
