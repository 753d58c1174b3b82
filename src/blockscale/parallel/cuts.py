"""Where a dimension is cut: arithmetic on integers, nothing else."""

from __future__ import annotations

import math

from ..errors import ShapeError

Range = tuple[int, int]
"""First element, and the one after the last."""

UNEVEN = 1.1
"""How much larger than its even share the largest part may be before a cut goes inside a block."""
FINEST = 8
"""Elements. A cut inside a block falls on a multiple of this: whole bytes of FP4, and aligned reads."""


def cut(size: int, ranks: int, block: int) -> tuple[Range, ...]:
    """`size` elements over `ranks` ranks, in order, every rank at least one element.

    Cuts fall on multiples of `block` where the largest part then stays within UNEVEN of the even share. Otherwise they
    fall inside a block, on multiples of half a block, a quarter …: 576 over 2 in blocks of 128 is 288 and 288, 320
    over 8 is 40 each, 2048 over 3 is 704, 704, 640. Uneven parts are ordinary: 8192 over 3 is 2816, 2688, 2688.

    Raises ShapeError when some rank would get less than FINEST elements.
    """
    grains, grain = [], block
    while grain >= min(FINEST, block):
        grains.append(grain)
        if grain % 2:
            break
        grain //= 2
    fitting = [grain for grain in grains if -(-size // grain) >= ranks]
    if not fitting:
        raise ShapeError(f"{size} elements over {ranks} ranks: a rank would hold less than {grains[-1]}")
    best = next((g for g in fitting if _largest(size, ranks, g) * ranks <= size * UNEVEN), None)
    if best is None:
        best = min(fitting, key=lambda g: _largest(size, ranks, g))
    return tuple((b * best, min(e * best, size)) for b, e in shares(-(-size // best), ranks))


def _largest(size: int, ranks: int, grain: int) -> int:
    blocks = -(-size // grain)
    return -(-blocks // ranks) * grain


def shares(count: int, ranks: int) -> tuple[Range, ...]:
    """`count` whole things (heads, experts, tokens) over `ranks`: the first ranks get one more where it is uneven."""
    each, more = divmod(count, ranks)
    starts = [rank * each + min(rank, more) for rank in range(ranks + 1)]
    return tuple((starts[rank], starts[rank + 1]) for rank in range(ranks))


def scaled(ranges: tuple[Range, ...], by: int) -> tuple[Range, ...]:
    """Ranges of things as ranges of elements, `by` elements each."""
    return tuple((b * by, e * by) for b, e in ranges)


def grain(ranges: tuple[Range, ...], block: int) -> int:
    """The coarsest blocks in which every one of these ranges starts on a boundary when they are laid end to end."""
    ends = [e - b for b, e in ranges[:-1]]
    return math.gcd(block, *(b for b, _ in ranges), *ends)
