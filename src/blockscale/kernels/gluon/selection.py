"""Which configuration a shape gets: a function of (m, n, k, SMs, card). A measured table first, then a rule.

Decode steps follow a rule: as many programs as there are SMs, K split for that at most four ways. For more tokens the
configuration with the least predicted time is taken; the constants are from one H200 (bench/results/hopper-notes.md).
"""

from __future__ import annotations

from functools import cache

from . import tables
from .config import Config, Grid, Swap, Wide, ceil_div, parse, wide_grid

_MOST_SWAPPED = 64
BLOCK_US = {32: 0.185, 64: 0.255, 128: 0.375, 192: 0.60, 256: 0.77}
"""Microseconds of one k-block of a 128 x bn tile."""
THROTTLE = 1.09  # the same when all SMs multiply for long: the chip lowers its clock
LAUNCH_US = 2.5
TILE_US = 0.45  # of a tile's epilogue, and TILE_128_US for each 128 columns of it
TILE_128_US = 0.25
CUT = 1.1  # cut tiles put the programs out of step, and L2 serves fewer of them at once
READ_US = 1 / 4.1e6  # of one byte from memory


def wide_us(config: Wide, m: int, n: int, k: int, sm_count: int) -> float:
    """Predicted time of a wide launch, in microseconds."""
    grid = wide_grid(config, m, n, k, sm_count)
    k_blocks = ceil_div(k, 128)
    blocks = grid.full_waves * k_blocks
    tiles = grid.full_waves
    fixup = 0.0
    if grid.cut_tiles:
        left = config.tiles(m, n) - grid.full_waves * grid.programs
        blocks += ceil_div(left * k_blocks, grid.dealt)
        tiles += 1
        # leave a partial tile, take a ticket, add up; twice where ranges do not end with tiles
        fixup = (1.5 + 3.5 * config.bn / 128) * (1 if grid.dealt % left == 0 else 2)
    busy = blocks * BLOCK_US[config.bn] + tiles * (TILE_US + TILE_128_US * config.bn / 128)
    if grid.full_waves > 1 and config.bn >= 128:
        busy *= THROTTLE
    if grid.cut_tiles and grid.full_waves:
        busy *= CUT
    return LAUNCH_US + max(busy, (n * k + m * k) * READ_US) + fixup


def _wide(m: int, n: int, k: int, sm_count: int) -> list[Wide]:
    """Wide configurations that differ in more than name."""
    found: dict[tuple[int, Grid], Wide] = {}
    for bn, unroll in ((32, 8), (64, 8), (128, 8), (192, 4), (256, 2)):
        for parts in (1, 2, 3, 4):
            config = Wide(bn, min(unroll, 4) if k < 1024 else unroll, parts, way="r" if bn > 128 else "o", pdl=m < 2048)
            grid = wide_grid(config, m, n, k, sm_count)
            if parts == 1 or grid.cut_tiles:
                found.setdefault((bn, grid), config)
    return list(found.values())


def _swapped(m: int, n: int, k: int, sm_count: int) -> Swap:
    """The rule for a decode step."""
    tokens = max(8, 1 << (m - 1).bit_length())
    k_blocks = ceil_div(k, 128)
    tiles = Swap(tokens).tiles(m, n)
    split = max(1, min(4, sm_count // tiles, k_blocks // 4))
    per_sm = min(ceil_div(tiles * split, sm_count), 4 if tokens <= 32 else 3)
    # programs of the next launch that arrive early would take the places of this one's
    pdl = per_sm == 1 or tiles * split > 0.9 * per_sm * sm_count
    two = k_blocks % 2 == 0 and (tokens == 32 or (tokens == 64 and split > 1))
    return Swap(tokens, 1, split, per_sm, 2 if two else 1, pdl)


def by_rule(m: int, n: int, k: int, sm_count: int) -> Config:
    """The configuration of a shape that the table does not hold."""
    if m <= _MOST_SWAPPED:
        return _swapped(m, n, k, sm_count)
    return min(_wide(m, n, k, sm_count), key=lambda c: (wide_us(c, m, n, k, sm_count), str(c)))


@cache
def choose(m: int, n: int, k: int, sm_count: int, chip: str = "") -> Config:
    """The configuration for a shape: as measured on this card, where its table knows it, else by the rule.

    chip: the card's name, as in the platform's feature "chip"; "" asks no table.
    """
    return measured(m, n, k, chip) or by_rule(m, n, k, sm_count)


def measured(m: int, n: int, k: int, chip: str) -> Config | None:
    """The table's configuration for the nearest larger M that is tiled alike; None when there is none.

    Alike: the same tokens of a swapped tile, or as many rows of 128 (an eighth more or less beyond 2048 rows).
    """
    for at, text in sorted((int(at), text) for at, text in tables.read(chip).get(f"{n}x{k}", {}).items()):
        if at < m:
            continue
        alike = _tokens(at) == _tokens(m) if at <= 64 else 8 * (ceil_div(at, 128) - ceil_div(m, 128)) <= at // 2048
        return parse(text) if alike else None
    return None


def _tokens(m: int) -> int:
    """Tokens of a swapped tile: a power of two, at least what wgmma takes; 0 beyond 64."""
    return max(8, 1 << (m - 1).bit_length()) if m <= 64 else 0
