"""Which configuration a shape gets: a function of (m, n, k, SMs, card, bytes of a result). A measured table first, then
a rule."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from . import tables
from .candidates import LONG_K, MANY_ROWS, ranked
from .config import Config, Swap, Wide, ceil_div, parse

_SMALL_TILES = 64  # rows of x up to which tiles are small, and so is what stages their results
_SHORT_K = 1024
_ALL_X, _ALL_X_K = 32, 1536  # rows of tiles of a launch with short K: their x stays in L2 while w is read once


def by_rule(m: int, n: int, k: int, sm_count: int, out_bytes: int = 2) -> Config:
    """The configuration of a shape that no table holds: the one with the least predicted time.

    out_bytes: bytes of an element of the result, 2 or 4: what is written, and what it takes to stage it.
    """
    best = ranked(m, n, k, sm_count, out_bytes)[0]
    if isinstance(best, Wide):
        pdl, early = _start(best, m, n, k, sm_count)
        together = _ALL_X if k <= _ALL_X_K and best.bn == 256 else 0
        return replace(best, pdl=pdl, early=early, together=together)
    return best


def _start(config: Wide, m: int, n: int, k: int, sm_count: int) -> tuple[bool, bool]:
    """(start while the launch before drains, fetch weights meanwhile): what was faster where both were measured.

    A wave that fills the GPU loses by an early start when K is long: its programs come to run in any order, and those
    that share weights ask for them at different times. A wave that leaves SMs free gains by it, but early weights get
    in the way of the launch before.
    """
    tiles = config.tiles(m, n)
    if m <= 64 or k <= (1536 if m <= 256 else _SHORT_K) or config.parts > 1:
        return True, True
    if m > MANY_ROWS:
        fast = config.bn >= 192 or config.groups == 3
        return fast, fast and not (config.bn == 256 and k >= LONG_K)
    if config.groups == 1 and config.bn == 128 and 0.7 * sm_count < tiles <= sm_count and k >= 4096:
        return False, False
    if tiles > sm_count:
        fast = m <= 256 or k < 4096
        return fast, fast
    if tiles > 0.95 * sm_count:
        fast = m <= 128 or k < 5120
        return fast, fast
    if k > 8192:
        return m <= 256, m <= 256
    return True, False


@cache
def choose(m: int, n: int, k: int, sm_count: int, chip: str = "", out_bytes: int = 2) -> Config:
    """The configuration for a shape: as measured on this card, where its table knows it, else by the rule.

    chip: the card's name, as in the platform's feature "chip"; "" asks no table. out_bytes: bytes of an element of the
    result, see `by_rule`.
    """
    return measured(m, n, k, chip, out_bytes) or by_rule(m, n, k, sm_count, out_bytes)


def measured(m: int, n: int, k: int, chip: str, out_bytes: int = 2) -> Config | None:
    """The table's configuration for the nearest larger M that is tiled alike; None when there is none.

    Tables are measured with results of two bytes. Staging four takes as much memory again: that counts in large tiles.
    """
    at = _row(m, n, k, chip, out_bytes)
    return None if at is None else parse(tables.read(chip)[f"{n}x{k}"][str(at)])


def entry(m: int, n: int, k: int, chip: str = "", out_bytes: int = 2) -> str:
    """Where `choose` finds the configuration: a table's file and row, or the rule."""
    at = _row(m, n, k, chip, out_bytes)
    return "rule" if at is None else f"{tables.origin(chip, f'{n}x{k}', str(at))}, row {n}x{k}, M={at}"


def misfit(config: Config, k: int) -> str:
    """Why a configuration cannot walk through K columns: what it needs and what K gives; "" when it can."""
    blocks = ceil_div(k, 128)
    if blocks % config.step:
        return f"K={k} has {blocks} k-blocks, {config} needs a multiple of {config.step}"
    if isinstance(config, Swap) and config.split > blocks // config.step:
        return f"K={k} has {blocks // config.step} steps, {config} needs {config.split} or more, one for each part of K"
    return ""


def _row(m: int, n: int, k: int, chip: str, out_bytes: int) -> int | None:
    """The M of the row that serves m rows.

    Alike: the same tokens of a swapped tile, or as many rows of 128 (an eighth more or less beyond 2048 rows).
    """
    if out_bytes > 2 and m > _SMALL_TILES:
        return None
    for at in sorted(int(at) for at in tables.read(chip).get(f"{n}x{k}", {})):
        if at < m:
            continue
        alike = _tokens(at) == _tokens(m) if at <= 64 else 8 * (ceil_div(at, 128) - ceil_div(m, 128)) <= at // 2048
        return at if alike else None
    return None


def _tokens(m: int) -> int:
    """Tokens of a swapped tile: a power of two, at least what wgmma takes; 0 beyond 64."""
    return max(8, 1 << (m - 1).bit_length()) if m <= 64 else 0
