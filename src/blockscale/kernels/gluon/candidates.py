"""Configurations that are worth a thought for a shape, and what a model expects of each. Pure.

The model: the waves' multiplying beside all reading, and what nothing hides: the launch, the end of the last tile, the
sum of cut tiles. Constants from one H100 (bench/results/hopper-notes.md). It ranks; only a measurement decides
(`blockscale tune`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .config import Config, Swap, Wide, ceil_div, wide_grid

MOST_SWAPPED = 32  # tokens; with more, tiles of 64 tokens are faster as they stand
LONG_K = 4096  # from here on weight scales by TMA are 1-3 % faster than by plain loads
READ_US = 1 / 3.16e6
"""Microseconds of one byte from memory (H100; an H200 reads half as much again)."""
READ_SM_US = 1 / 40e3
"""The same where few SMs read: what one of them gets."""
LAUNCH_US = 2.3
TILE_US = 0.32  # the end of a tile, and TILE_128_US for each 128 columns of it
TILE_128_US = 0.19
BLOCK_US = {
    1: {16: 0.09, 32: 0.114, 64: 0.167, 96: 0.26, 128: 0.233, 160: 0.385, 192: 0.48},
    2: {32: 0.19, 64: 0.255, 96: 0.44, 128: 0.375, 192: 0.557, 256: 0.71},
    3: {128: 0.50},
}
"""Microseconds of one k-block of a tile, by warpgroups and columns."""
SWAP_BLOCK_US = 0.12
ONE_STEP = 1.9  # times that, where k-blocks are waited for one by one
THROTTLE = 1.1  # the same when all SMs multiply for long: the chip lowers its clock
CUT_US = 0.4  # leave a partial tile, take a ticket, add up; and for each 64 x 64 of the tile and each part:
CUT_64_US = 0.46
OUT_OF_STEP = 1.035  # cut tiles after whole waves: programs drift apart, and L2 serves fewer of them at once
SWAP_CUT_US = {8: 0.46, 16: 0.4, 32: 0.74}
SWAP_READ = {8: 0.93, 16: 1.09, 32: 1.15}  # times READ_US: tokens and weights share the way into an SM
SHARED_READ = 1.11  # the same, where programs share an SM, or tiles are cut unevenly
SWAP_END_US = 0.25  # writing y
BLEND = 5.0  # of multiplying and reading: the larger, the less they hinder each other


def _unroll(blocks: int, most: int, step: int) -> int:
    """The largest unroll that divides K's blocks: what is left over runs with the tensor cores running dry."""
    return max(u for u in range(step, max(most, step) + 1, step) if blocks % u == 0 or u == step)


def _together(compute: float, read: float) -> float:
    """Microseconds of multiplying and reading side by side: the longer of the two, and more where they are alike."""
    return float((compute**BLEND + read**BLEND) ** (1 / BLEND))


def _read_us(size: float, programs: int, sm_count: int) -> float:
    """Microseconds of reading `size` bytes."""
    return max(size * READ_US, size / min(programs, sm_count) * READ_SM_US)


def wide_us(config: Wide, m: int, n: int, k: int, sm_count: int, out_bytes: int = 2) -> float:
    """Predicted microseconds of a wide launch. out_bytes: bytes of an element of y."""
    grid = wide_grid(config, m, n, k, sm_count)
    blocks, tiles, places = ceil_div(k, 128), config.tiles(m, n), sm_count * config.per_sm
    read = _read_us(n * k + m * k + out_bytes * m * n, grid.programs, sm_count)
    block = BLOCK_US[config.groups][config.bn] * config.per_sm
    if grid.full_waves > 1 and m >= 1024:
        block *= THROTTLE
    tile = TILE_US + TILE_128_US * config.bn / 128
    waves = min(grid.full_waves, ceil_div(tiles, places))
    compute = waves * (blocks * block + tile) - tile  # the last tile's end, which nothing hides, comes at last
    if not grid.cut_tiles:
        return LAUNCH_US + _together(compute, read) + tile
    left = tiles - waves * places
    compute += blocks * left / grid.dealt * block + (tile if waves == 0 else 2 * tile)
    fixup = CUT_US + CUT_64_US * config.groups * config.bn / 64 * ceil_div(grid.dealt, left)
    return (LAUNCH_US + _together(compute, read) + tile + fixup) * (OUT_OF_STEP if waves else 1)


def swap_us(config: Swap, m: int, n: int, k: int, sm_count: int) -> float:
    """Predicted microseconds of a swapped launch."""
    blocks, tiles = ceil_div(k, 128), config.tiles(m, n)
    programs = config.programs(m, n, k, sm_count)
    waves = ceil_div(programs, sm_count * config.per_sm)
    steps = blocks / config.split if config.split else blocks * tiles / programs
    block = SWAP_BLOCK_US * config.per_sm * (1 if config.step > 1 else ONE_STEP)
    fixup = 0.0 if config.split == 1 else SWAP_CUT_US[config.tokens] * (1 if config.split else 0.5)
    read = _read_us(n * k + m * k, programs, sm_count) * SWAP_READ[config.tokens]
    read *= SHARED_READ if config.per_sm > 1 or not config.split else 1
    return LAUNCH_US + _together(waves * steps * block, read) + fixup + SWAP_END_US


def predicted_us(config: Config, m: int, n: int, k: int, sm_count: int, out_bytes: int = 2) -> float:
    """Predicted microseconds of a launch. out_bytes: bytes of an element of y."""
    if isinstance(config, Wide):
        return wide_us(config, m, n, k, sm_count, out_bytes)
    return swap_us(config, m, n, k, sm_count)


def _widest(k: int) -> Wide:
    """Tiles of 256 columns: with short K, what counts is not to wait for stores."""
    unroll = _unroll(ceil_div(k, 128), 4, 1)
    return Wide(256, unroll, 1, 2, 1, "l", staging=128) if k < LONG_K else Wide(256, unroll, 1, 2, 1, "t")


def _wide(m: int, n: int, k: int, sm_count: int) -> Iterator[Wide]:
    blocks = ceil_div(k, 128)
    two = 2 if blocks % 2 == 0 else 1
    most = 8 if m <= 32 else 16  # unroll: with more tokens the tensor cores count, and when they run dry
    if m <= 128:
        for bn in (16, 32, 64, 96, 128) if m <= 64 else (32, 64, 96, 128):
            unroll = _unroll(blocks, 4 if bn == 96 else most, two)
            for parts in (1, 2, 3):
                yield Wide(bn, unroll, parts, 1, two)
                if bn == 64 and two == 2 and m > 32:
                    yield Wide(bn, _unroll(blocks, most, 1), parts, 1, 1)
        for bn in (160, 192):
            yield Wide(bn, _unroll(blocks, 4, two), 1, 1, two)
        if k <= 1024:
            yield Wide(64, _unroll(blocks, 8, two), 1, 1, two, per_sm=2)
    if m > 64:
        for bn in (32, 64):
            for parts in (1, 2, 3) if m <= 512 else ():
                yield Wide(bn, _unroll(blocks, most, two), parts, 2, two)
        if m <= 1024:
            yield Wide(64, _unroll(blocks, most, 1), 1, 2, 1)
        for parts in (1, 2, 3) if m <= 512 else (1,):
            yield Wide(128, _unroll(blocks, 8, 1), parts, 2, 1, staging=128)
        yield Wide(192, _unroll(blocks, 8, 1), 1, 2, 1, "s", staging=192)
        yield _widest(k)
    if 128 < m <= 1024:
        yield Wide(128, _unroll(blocks, 8, two), 1, 1, two)
    if 64 < m <= 256:
        yield Wide(96, _unroll(blocks, 4, 1), 1, 2, 1)


def _swapped(m: int, n: int, k: int, sm_count: int) -> Iterator[Swap]:
    tokens = max(8, 1 << (m - 1).bit_length())
    blocks = ceil_div(k, 128)
    two = 2 if blocks % 2 == 0 else 1
    tiles = Swap(tokens).tiles(m, n)
    for split in range(1, 5):
        if blocks < 4 * split and split > 1:
            continue
        per_sm = ceil_div(tiles * split, sm_count)
        if per_sm <= (3 if k > 1024 else 4) and (split == 1 or tiles * split <= 2 * sm_count):
            for step in sorted({1, two}):
                yield Swap(tokens, 1, split, per_sm, step)
    if tiles > sm_count and blocks >= 32:
        yield Swap(tokens, 1, 0, 1, two)


def ranked(m: int, n: int, k: int, sm_count: int, out_bytes: int = 2) -> list[Config]:
    """All of them, the one with the least predicted time first."""
    found: list[Config] = []
    grids = set()
    for config in _wide(m, n, k, sm_count):
        grid = wide_grid(config, m, n, k, sm_count)
        kind = (replace(config, parts=1), grid)
        if kind not in grids and (config.parts == 1 or grid.cut_tiles):
            grids.add(kind)
            found.append(config)
    if m <= MOST_SWAPPED:
        found += _swapped(m, n, k, sm_count)
    return sorted(found, key=lambda c: (predicted_us(c, m, n, k, sm_count, out_bytes), str(c)))


def candidates(m: int, n: int, k: int, sm_count: int, count: int = 6) -> list[Config]:
    """What tuning measures: the best few by the model, and other ways to start or to walk through the best of them."""
    best = ranked(m, n, k, sm_count)[:count]
    blocks = ceil_div(k, 128)
    more: list[Config] = []
    for config in best[:2] if m > 64 else []:
        assert isinstance(config, Wide)
        more += [replace(config, pdl=False), replace(config, early=False)]
    if m >= 1024:  # many waves: how a tile is walked counts more than how it starts
        more += [
            Wide(256, _unroll(blocks, 4, 1), 1, 2, 1, "l", staging=128),
            Wide(256, _unroll(blocks, 4, 1), 1, 2, 1, "t"),
            Wide(128, _unroll(blocks, 8, 1), 1, 2, 1, "t", staging=128, pdl=False),
        ]
        if k <= 1024 or n <= 2304:
            more.append(Wide(128, _unroll(blocks, 4, 1), 1, 3, 1, "t", staging=128, pdl=False))
    return list(dict.fromkeys([*best, *more]))
