"""Tiles for operands that 16 bits hold with their scales: pure functions, timed on one H100.

Up to FOLDED_M rows Hopper decodes weights in registers (`folded_kernels`); with more rows it decodes a slice of the
weight beforehand and multiplies that (`dense_kernels`). Source of all numbers:
bench/results/h100-small-blocks.md; N and K of 2048x7168, 7168x2048 and 18432x7168, weights in blocks of 32x32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from ...contract import Problem
from ...platform import Platform
from ...tuning import GemmTile, gemm_tile, multiprocessors
from . import capability

FOLDED_M = 512
"""At 512 rows decoding in registers took 42, 35 and 325 us, decoding beforehand 51, 38 and 348; at 1024 rows the latter
is faster."""
_POINTERS_M = 16
"""Up to here rows are few enough for sm_80's instructions, which need no shuffling: 10.3 us, not 11.2 (2048x7168)."""
_SLICE = 32 << 20
"""Elements of a slice of decoded weights: 64 MiB. Slices of 29 MiB to all at once differed by 1-3 %."""
_SHARED = 227 << 10


def shuffles(m: int, k: int, group: int | None, platform: Platform) -> bool:
    """Whether m rows (of one expert) meet weights that are decoded in wgmma's registers, so that x comes shuffled.

    group: elements of K that share a weight's scale, which a step of 64 has to hold whole.
    """
    return platform.capability == 90 and m > _POINTERS_M and k % 32 == 0 and group in (16, 32, 64)


@lru_cache(1 << 12)
def folded_tile(m: int, n: int, k: int, platform: Platform) -> GemmTile:
    """Tile of `folded_kernels.folded_kernel`, which swaps the operands: bn rows of w on the instruction's M side."""
    wide = n > 64 * multiprocessors(platform)
    if m <= 32:
        tile = GemmTile(32, 64, 128, 4, 4, "M <= 32")
    elif m <= 64:
        tile = GemmTile(64, 128, 64, 4, 5, "M <= 64, wide") if wide else GemmTile(64, 64, 128, 4, 4, "M <= 64")
    elif m <= 128:
        tile = GemmTile(128, 64, 128, 4, 3, "M <= 128")
    elif m <= 256:
        tile = GemmTile(128, 128, 64, 8, 5, "M <= 256, wide") if wide else GemmTile(128, 64, 64, 4, 5, "M <= 256")
    else:
        tile = GemmTile(256, 128, 64, 8, 4, "M <= 512")
    tile = replace(tile, swap=True, entry=f"gemm exact: measured, sm_90/folded, {tile.entry}")
    return replace(tile, split=_split(tile, m, n, k, multiprocessors(platform)))


def _split(tile: GemmTile, m: int, n: int, k: int, sms: int) -> int:
    """Slices of K: the fewest steps in a row, waves of programs that fit side by side times the steps of each and four
    more, which beginning and ending a program costs. It picks what was fastest, or within 6 % of that."""
    shared = tile.bk * (2 * tile.bm * tile.stages + tile.bn * (tile.stages - 1))  # a stage of w is in registers
    slots = sms * max(_SHARED // (shared + 1024), 1)
    tiles, steps = -(-m // tile.bm) * -(-n // tile.bn), -(-k // tile.bk)
    fits = [s for s in (1, 2, 4, 8) if s == 1 or (steps // s >= 4 and 2 * tiles * s <= 9 * sms)]
    return min(fits, key=lambda s: -(-tiles * s // slots) * (-(-steps // s) + 4))


# tile, programs side by side on a multiprocessor, elements of K that begin and end a tile, us of a wave for each of K
_DENSE = (
    (GemmTile(256, 128, 64, 8, 4, "256x128"), 1, 407, 0.01002),
    (GemmTile(128, 128, 64, 8, 4, "128x128"), 1, 322, 0.00611),
    (GemmTile(128, 128, 64, 4, 3, "two programs"), 2, 52, 0.01262),
)


@lru_cache(1 << 12)
def dense_plan(m: int, n: int, k: int, block_rows: int, platform: Platform) -> tuple[int, GemmTile]:
    """(weight rows to decode and multiply before the next, in whole blocks; tile of `dense_kernels.dense_kernel`).

    Fewest waves of programs win: at 4096x18432x7168 1525 us with slices of 2048 rows, 1955 with 2304, which end in a
    third wave of a few tiles. A slice holds _SLICE elements, or what one wave takes.
    """
    sms, unit = multiprocessors(platform), math.lcm(128, block_rows)
    best: tuple[float, int, GemmTile] | None = None
    for tile, resident, ends, rate in _DENSE:
        wave = -(-resident * sms // -(-m // tile.bm)) * tile.bn
        most = min(max(_SLICE // k, wave, unit), n + unit - 1) // unit * unit
        for rows in range(unit, most + 1, unit):
            slices, rest = divmod(n, rows)
            waves = sum(
                count * -(-(-(-m // tile.bm) * -(-part // tile.bn)) // (resident * sms))
                for count, part in ((slices, rows), (1, rest))
            )
            cost = waves * (k + ends) * rate + 3 * (slices + (rest > 0))
            if best is None or cost < best[0]:
                best = cost, rows, tile
    assert best is not None
    name = "measured, sm_90" if platform.capability == 90 else f"compiled, {platform.arch}"
    return best[1], replace(best[2], entry=f"gemm exact: {name}/dense, {best[2].entry}")


def configurations(problem: Problem, platform: Platform) -> Iterator[str]:
    """What `explain` says of a problem whose operands 16 bits hold with their scales; of others nothing."""
    x, w = problem.x_format or problem.activation_format, problem.format
    if x is None or w is None or problem.numerics.act_floor < capability.SMALLEST_FLOOR:
        return
    dtype = capability.common_dtype(x, x.scale_dtype, w, w.scale_dtype, platform)
    if dtype is None:
        return
    kind = str(dtype).removeprefix("torch.")
    yield f"{kind} holds codes times scales of {x} and {w}: multiplied as such, fp32 sums, nothing promoted"
    if problem.op == "linear" and platform.capability == 90:
        for m in (1, 16, 64, 256, 512, 1024, 4096):
            if m > FOLDED_M:
                rows, tile = dense_plan(m, problem.n, problem.k, w.block[0] or 1, platform)
                how = f"weights decoded before, {min(rows, problem.n)} rows at a time"
            elif shuffles(m, problem.k, w.block[1], platform):
                tile, how = folded_tile(m, problem.n, problem.k, platform), "weights decoded in registers"
            else:
                tile, how = (
                    gemm_tile("weight_only_fold", m, problem.n, problem.k, 0, platform),
                    "weights decoded in the loop",
                )
            yield f"M={m}: {how}, {tile.bm}x{tile.bn}x{tile.bk}, K in {tile.split} ({tile.entry})"
