"""In which order rows are multiplied whose sums go to other ranks. Pure arithmetic; speed only.

A rank multiplies what others keep first, so that it travels while the rest is multiplied. Rows are dealt in regions,
each one multiplication: one for each other rank, then this rank's own. Some of the own rows join the last region
before: two times 2048 rows of 7168 columns make 4 waves of tiles each on 132 multiprocessors, 2304 and 1792 make 7.
"""

from __future__ import annotations

from .cuts import Range

TILE = (128, 256)
"""Rows and columns of a tile of the kernels for many rows: what a wave is counted in."""
_KEPT = 0.6
"""Share of its own rows that a rank multiplies last at least: their time must hide what travels."""


def rounds(owners: tuple[Range, ...], fits: int) -> list[tuple[Range, ...]]:
    """Rows of every owner in so many rounds that `fits` of each go into one; rounds of the same size."""
    most = max(e - b for b, e in owners)
    each = -(-most // -(-most // fits))
    return [tuple((min(b + s, e), min(b + s + each, e)) for b, e in owners) for s in range(0, most, each)]


def regions(owners: tuple[Range, ...], rank: int, width: int, processors: int) -> list[Range]:
    """What `rank` multiplies, in order: rows of the others, then its own. Empty ranges are left out.

    processors: multiprocessors that share the tiles; 0 where that is not known.
    """
    ranks, (begin, end) = len(owners), owners[rank]
    beside = rank - 1 if rank else 1  # the last one before this rank's own: its rows lie next to them
    others = [(rank + step) % ranks for step in range(1, ranks) if (rank + step) % ranks != beside]
    b, e = owners[beside]
    extra = 0
    if processors and (e == begin or b == end):
        extra = _extra(e - b, end - begin, width, processors)
    if e == begin:
        joined, own = (b, e + extra), (begin + extra, end)
    else:
        joined, own = (b - extra, e), (begin, end - extra)
    return [r for r in [*(owners[other] for other in others), joined, own] if r[1] > r[0]]


def _extra(rows: int, own: int, width: int, processors: int) -> int:
    """How many of `own` rows join the `rows` before them, so that both together take the fewest waves."""
    most = int(own * (1 - _KEPT)) // TILE[0] * TILE[0]
    return min(
        range(0, most + 1, TILE[0]),
        key=lambda extra: _waves(rows + extra, width, processors) + _waves(own - extra, width, processors),
    )


def _waves(rows: int, width: int, processors: int) -> int:
    return -(-(-(-rows // TILE[0]) * -(-width // TILE[1])) // processors)
