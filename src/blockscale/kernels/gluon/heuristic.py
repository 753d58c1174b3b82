"""Which configuration a shape gets: a pure function of (m, n, k, SMs), from a model of the chip.

The model, in cycles of an SM (fitted on one H200, bench/results/hopper-notes.md): the tensor cores are fed from shared
memory at 128 bytes a cycle, and what TMA writes there shares that rate. A k-block of a 128 x bn tile is read once by
wgmma (x by both warpgroups together once, w by each of them) and written once by TMA: 256 + 3 bn cycles, against
4 bn that the tensor cores themselves need. So wide tiles are better until the last wave is badly filled.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from .config import Config, Grid, Swap, Wide, ceil_div, parse, wide_grid

_TABLE_SMS = 132
_MOST_SWAPPED = 64

CLOCK = 1600.0  # cycles a microsecond under load
READ = 4.1e3  # bytes a nanosecond would be 4.1; here bytes a microsecond, in thousands
SM_READ = 45.0  # bytes a nanosecond that one SM takes in
LAUNCH_US = 2.5
FIXUP_US = 2.0  # leave a partial tile, take a ticket, add up
TILE_US = 0.5  # epilogue of 128 columns


def wide_us(config: Wide, m: int, n: int, k: int, sm_count: int) -> float:
    """Predicted time of a wide launch, in microseconds."""
    grid = wide_grid(config, m, n, k, sm_count)
    k_blocks = ceil_div(k, 128)
    blocks = grid.full_waves * k_blocks
    fixup = 0.0
    tiles = grid.full_waves
    if grid.cut_tiles:
        left = config.tiles(m, n) - grid.full_waves * grid.programs
        blocks += ceil_div(left * k_blocks, grid.dealt)
        tiles += 1
        fixup = FIXUP_US * config.bn / 128 * (1 + 0.15 * max(0, grid.dealt / left - 2))
    busy = blocks * (256 + 3 * config.bn) / CLOCK + tiles * TILE_US * config.bn / 128
    if config.bn == 256:
        busy *= 1.05
    return LAUNCH_US + max(busy, (n * k + m * k) / READ / 1e3) + fixup


def swap_us(config: Swap, m: int, n: int, k: int, sm_count: int) -> float:
    """Predicted time of a swapped launch, in microseconds."""
    k_blocks = ceil_div(k, 128)
    programs = config.programs(m, n, k, sm_count)
    units = ceil_div(config.tiles(m, n) * k_blocks, programs)
    on_one_sm = ceil_div(programs, sm_count)
    block = max(128 + 2 * config.tokens, 450 / (min(on_one_sm, config.per_sm) * config.groups))
    busy = on_one_sm * units * block / CLOCK
    reading = (n * k + m * k) / READ / 1e3
    fixup = 0.0 if config.split == 1 else 1.2 + 0.05 * (config.split or 3) + config.tokens / 64
    return LAUNCH_US + max(busy, reading) + fixup


def candidates(m: int, n: int, k: int, sm_count: int) -> list[tuple[float, Config]]:
    """(predicted microseconds, configuration), best first: every configuration that the kernels may get."""
    found: list[tuple[float, Config]] = []
    if m > _MOST_SWAPPED:
        found += [(wide_us(c, m, n, k, sm_count), c) for c in _wide(m, n, k, sm_count)]
    else:
        found += [(swap_us(c, m, n, k, sm_count), c) for c in _swapped(m, n, k, sm_count)]
    return sorted(found, key=lambda pair: (pair[0], str(pair[1])))


def _wide(m: int, n: int, k: int, sm_count: int) -> list[Wide]:
    k_blocks = ceil_div(k, 128)
    found: dict[tuple[int, Grid], Wide] = {}
    for bn, unroll in ((32, 8), (64, 8), (128, 8), (192, 4), (256, 2)):
        for parts in (1, 2, 3, 4):
            config = Wide(bn, min(unroll, 4) if k_blocks < 8 else unroll, parts, pdl=m < 2048)
            grid = wide_grid(config, m, n, k, sm_count)
            if parts == 1 or grid.cut_tiles:
                found.setdefault((bn, grid), config)
    return list(found.values())


def _swapped(m: int, n: int, k: int, sm_count: int) -> list[Swap]:
    tokens = max(8, 1 << (m - 1).bit_length())
    k_blocks = ceil_div(k, 128)
    step = 2 if k_blocks % 2 == 0 else 1
    found = []
    for groups in (1, 2):
        for split in (1, 2, 3, 4, 6, 8):
            if split == 1 or split <= k_blocks // step // 2:
                programs = Swap(tokens).tiles(m, n) * split
                most = (4 if tokens <= 32 else 3) // groups
                found.append(Swap(tokens, groups, split, min(ceil_div(programs, sm_count), most), step))
    return found


def by_model(m: int, n: int, k: int, sm_count: int) -> Config:
    """The configuration that the model likes best."""
    return candidates(m, n, k, sm_count)[0][1]


@cache
def choose(m: int, n: int, k: int, sm_count: int) -> Config:
    """The configuration for a shape: as measured, where the table knows it, else as the model says."""
    return measured(m, n, k, sm_count) or by_model(m, n, k, sm_count)


def measured(m: int, n: int, k: int, sm_count: int) -> Config | None:
    """The table's configuration for the nearest larger M that is tiled alike; None when there is none.

    Alike: the same tokens of a swapped tile, or as many rows of 128 (an eighth more or less beyond 2048 rows).
    """
    if sm_count != _TABLE_SMS:
        return None
    for at, text in sorted((int(at), text) for at, text in _table().get(f"{n}x{k}", {}).items()):
        if at < m:
            continue
        alike = _tokens(at) == _tokens(m) if at <= 64 else 8 * (ceil_div(at, 128) - ceil_div(m, 128)) <= at // 2048
        return parse(text) if alike else None
    return None


def _tokens(m: int) -> int:
    """Tokens of a swapped tile: a power of two, at least what wgmma takes; 0 beyond 64."""
    return max(8, 1 << (m - 1).bit_length()) if m <= 64 else 0


@cache
def _table() -> dict[str, dict[str, str]]:
    """N x K -> M -> configuration, measured on one H200 by `bench/gemm.py --tune`, chosen by bench/fit_gemm.py."""
    path = resources.files(__package__) / "h200.json"
    found: dict[str, dict[str, str]] = json.loads(path.read_text())
    return found
