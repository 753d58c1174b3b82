"""Which tiles, and which part of their k-blocks, a program of `wide.py` works on.

Whole tiles are dealt round the programs. With STREAM_K the tiles of the last, partial wave are cut along K into equal
ranges, one a program.
"""

# mypy: disable-error-code=assignment
# ruff: noqa: SIM108 (compiled by Gluon: branches on constexprs)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _divide(a, b, inverse):
    """a // b for numbers below 2^31, given the inverse of b (`config.inverse`): without it, 150 cycles."""
    quotient = gl.umulhi(a, inverse)
    return quotient + gl.where(a - quotient * b >= b, 1, 0)


@gluon.jit
def tile_origin(tile, num_m, num_n, walk, BM: gl.constexpr, BN: gl.constexpr, HIDDEN: gl.constexpr = False):
    """First row and column of a tile: groups of `together` tile rows; inside a group along M first, then N.

    A wave's tiles share operands in L2, the more the closer their rectangle is to a square. All of a group's x is read
    once a wave, and all of w once a group. walk: (together, inverses of a group's tiles, of its rows, and of the rows
    of the last group). HIDDEN: divisions have the products of a k-block to hide behind. ptxas then arranges those worse
    around anything shorter: 1.5 % of the time of 128 x 256 tiles at K = 1536 and 2048.
    """
    together, group_inverse, rows_inverse, last_inverse = walk
    per_group = together * num_n
    if HIDDEN:
        group = tile // per_group
    else:
        group = _divide(tile, per_group, group_inverse)
    first = group * together
    rows = gl.minimum(num_m - first, together)
    rest = tile - group * per_group
    if HIDDEN:
        col = rest // rows
    else:
        col = _divide(rest, rows, gl.where(rows == together, rows_inverse, last_inverse))
    return (first + rest - col * rows) * BM, col * BN


@gluon.jit
def first_unit(program, num_tiles, num_steps, full_waves, dealt):
    """Where a program's range of units starts; a unit is one step of a cut tile, dealt to `dealt` programs."""
    units = (num_tiles - full_waves * gl.num_programs(0)) * num_steps
    return gl.minimum(program, dealt) * units // dealt


@gluon.jit
def owner(unit, num_tiles, num_steps, full_waves, dealt):
    """The program that `unit` is dealt to."""
    units = (num_tiles - full_waves * gl.num_programs(0)) * num_steps
    return ((unit + 1) * dealt - 1) // units


@gluon.jit
def segments(num_tiles, num_steps, full_waves, dealt, STREAM_K: gl.constexpr):
    """Of this program: (segments, how many of them lie in cut tiles, first unit, end unit).

    full_waves: without STREAM_K the last of them may be a partial one.
    """
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    if STREAM_K:
        u0 = first_unit(pid, num_tiles, num_steps, full_waves, dealt)
        u1 = first_unit(pid + 1, num_tiles, num_steps, full_waves, dealt)
        cut = gl.where(u1 > u0, (u1 - 1) // num_steps - u0 // num_steps + 1, 0)
        return cut + full_waves, cut, u0, u1
    else:
        last = gl.where(pid + (full_waves - 1) * programs < num_tiles, 0, 1)
        return full_waves - last, 0, 0, 0


@gluon.jit
def segment(i, cut, u0, u1, num_steps, full_waves, STREAM_K: gl.constexpr):
    """(tile, first step, end step) of a program's i-th segment. Cut tiles come first: their sums finish early."""
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    if STREAM_K:
        t = u0 // num_steps + i
        is_cut = i < cut
        s0 = gl.where(is_cut, gl.maximum(u0 - t * num_steps, 0), 0)
        s1 = gl.where(is_cut, gl.minimum(u1 - t * num_steps, num_steps), num_steps)
        tile = gl.where(is_cut, full_waves * programs + t, (i - cut) * programs + pid)
        return tile, s0, s1
    else:
        return pid + i * programs, 0, num_steps
