"""Configurations that are worth a thought for a shape, and what a model expects of each. Pure.

The model: the waves' multiplying beside all reading, and what nothing hides: the launch, the end of the last tile, the
sum of cut tiles. Constants from two H100s (bench/results/hopper-notes.md). It ranks; only a measurement decides
(`blockscale tune`).

Tiles are cut into equal parts, and only where all parts run at once. Anything else was measured 1.3 to 2 times as slow:
programs that walk through K out of step read the same weights at different times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .config import Config, Swap, Wide, ceil_div, wide_grid

MOST_SWAPPED = 32  # tokens; with more, tiles of 64 tokens are faster as they stand
MOST_NARROW = 512  # rows; with 1024, tiles of 64 columns took 1.5 times as long a k-block
MANY_ROWS = 1024  # from here on there are many waves
MOST_PARTS = 4
MOST_SPLIT = 6
LONG_K = 2048  # from here on tiles of 256 columns gain 2 to 8 % by four k-blocks a loop; before, they lose 1 to 2 %
LAUNCH_US = 1.76
BESIDE_US = 0.58  # less, where the next launch fits beside this one
READ_US = 1 / 3.22e6
"""Microseconds of one byte from memory (H100; an H200 reads half as much again)."""
TILE_US = 0.66  # the end of a tile, for each 128 columns of it; a third more for each other warpgroup
SEAM = 0.47  # times that, where the next tile's first pieces hide it
BLOCK_US = {
    1: {16: 0.093, 32: 0.117, 64: 0.155, 96: 0.26, 128: 0.257, 160: 0.337, 192: 0.559},
    2: {32: 0.195, 64: 0.227, 96: 0.446, 128: 0.373, 192: 0.55, 256: 0.7},
    3: {128: 0.545},
}
"""Microseconds of one k-block of a tile, by warpgroups and columns."""
SINGLE = 0.77  # times that, for 64 x 128 with steps of one k-block in one wave
THROTTLE = 1.07  # times that, where all SMs multiply for long: the chip lowers its clock
CUT_US = 1.68  # leave a partial tile, take a ticket, add up; and for each 64 x 64 of the tile and each part:
CUT_64_US = 0.215
BLEND = 2.78  # of multiplying and reading: the larger, the less they hinder each other
SWAP_LAUNCH_US = 1.8
SWAP_READ_US = 1 / 3.0e6
SWAP_READ_SM_US = 1 / 34e3
"""Microseconds of one byte where few SMs read: what one of them gets."""
SWAP_READ = {8: 0.93, 16: 1.09, 32: 1.15}  # times that: tokens and weights share the way into an SM
SWAP_SHARED = 1.03  # times that, where programs share an SM
SWAP_BLOCK_US = 0.12
ONE_STEP = 1.9  # times that, where k-blocks are waited for one by one
SWAP_CUT_US = {8: 0.37, 16: 0.32, 32: 0.59}
SWAP_DEALT = 1.5  # times that, where steps are dealt evenly
SWAP_FULL, SWAP_FULL_US = 0.85, 0.2  # with a larger part of the SMs taken by parts of tiles, so much more
SWAP_END_US = 0.25  # writing y
SWAP_BLEND = 3.5
UNROLLS = (1, 2, 4, 6, 8, 16)
"""Few, since each is another kernel to compile; 16 pays for tiles of 64 columns alone."""


def _unroll(blocks: int, most: int, step: int) -> int:
    """The unroll with which the tensor cores run dry least often: after each round, and each step that is left over."""
    fits = [u for u in UNROLLS if u % step == 0 and u <= max(most, step)]
    return min(fits, key=lambda u: (blocks // u + blocks % u // step, -u))


def _together(compute: float, read: float, blend: float) -> float:
    """Microseconds of multiplying and reading side by side: the longer of the two, and more where they are alike."""
    return float((compute**blend + read**blend) ** (1 / blend))


def _is_single(config: Wide, m: int, n: int, sm_count: int) -> bool:
    """Whether tiles of 64 x 128 make one wave."""
    return m > 64 and config.groups == 1 and config.bn == 128 and config.tiles(m, n) <= sm_count


def wide_us(config: Wide, m: int, n: int, k: int, sm_count: int, out_bytes: int = 2) -> float:
    """Predicted microseconds of a wide launch. out_bytes: bytes of an element of y."""
    grid = wide_grid(config, m, n, k, sm_count)
    blocks, tiles = ceil_div(k, 128), config.tiles(m, n)
    read = (n * k + m * k + out_bytes * m * n) * READ_US
    block = BLOCK_US[config.groups][config.bn] * config.per_sm
    if _is_single(config, m, n, sm_count) and config.step == 1:
        block *= SINGLE
    if grid.full_waves > 1 and m >= MANY_ROWS:
        block *= THROTTLE
    tile = TILE_US * config.bn / 128 * (1 + (config.groups - 1) / 3)
    launch = LAUNCH_US - (BESIDE_US if grid.programs * 2 <= sm_count * config.per_sm else 0)
    if grid.cut_tiles:
        parts = grid.dealt / tiles
        fixup = CUT_US + CUT_64_US * config.groups * config.bn / 64 * parts
        return launch + _together(blocks / parts * block, read, BLEND) + tile + fixup
    # the last tile's end, which nothing hides, comes at last
    between = tile * SEAM if config.in_turn and config.pieces > 1 else tile
    compute = grid.full_waves * blocks * block + (grid.full_waves - 1) * between
    return launch + _together(compute, read, BLEND) + tile


def swap_us(config: Swap, m: int, n: int, k: int, sm_count: int) -> float:
    """Predicted microseconds of a swapped launch."""
    blocks, tiles = ceil_div(k, 128), config.tiles(m, n)
    programs = config.programs(m, n, k, sm_count)
    beside = min(config.per_sm, ceil_div(programs, sm_count))
    waves = ceil_div(programs, sm_count * config.per_sm)
    steps = blocks / config.split if config.split else blocks * tiles / programs
    block = SWAP_BLOCK_US * beside * (1 if config.step > 1 else ONE_STEP)
    size = n * k + m * k
    read = max(size * SWAP_READ_US, size / min(programs, sm_count) * SWAP_READ_SM_US) * SWAP_READ[config.tokens]
    read *= SWAP_SHARED if config.per_sm > 1 or not config.split else 1
    us = SWAP_LAUNCH_US + _together(waves * steps * block, read, SWAP_BLEND) + SWAP_END_US
    if config.split != 1:
        us += SWAP_CUT_US[config.tokens] * (1 if config.split else SWAP_DEALT)
    full = config.per_sm == 1 and config.split > 1 and programs > SWAP_FULL * sm_count
    return us + SWAP_FULL_US if full else us


def predicted_us(config: Config, m: int, n: int, k: int, sm_count: int, out_bytes: int = 2) -> float:
    """Predicted microseconds of a launch. out_bytes: bytes of an element of y."""
    if isinstance(config, Wide):
        return wide_us(config, m, n, k, sm_count, out_bytes)
    return swap_us(config, m, n, k, sm_count)


def _staging(columns: int, out_bytes: int) -> int:
    """Columns of y to stage: all of a tile's, so that it never waits for a store, but four bytes take too much room."""
    return columns if out_bytes <= 2 else 64


def _widest(k: int, out_bytes: int) -> Wide:
    """Tiles of 128 x 256: the fewest bytes and ends of tiles for a product."""
    return Wide(256, 4 if k >= LONG_K else 1, 1, 2, 1, "l", staging=_staging(128, out_bytes))


def _tallest(out_bytes: int) -> Wide:
    """Tiles of 192 x 128: they fill waves of 1536 and 2112 columns."""
    return Wide(128, 2, 1, 3, 1, "t", staging=_staging(128, out_bytes))


def _wide(m: int, n: int, k: int, sm_count: int, out_bytes: int) -> Iterator[Wide]:
    blocks = ceil_div(k, 128)
    two = 2 if blocks % 2 == 0 else 1
    eight, four = _unroll(blocks, 8, two), _unroll(blocks, 4, two)
    if m <= 64:
        yield Wide(16, eight, 1, 1, two)
        if k <= 1024:
            yield Wide(64, eight, 1, 1, two, per_sm=2)
    if m <= 128:
        yield from (Wide(32, eight, 1, 1, two), Wide(96, four, 1, 1, two))
        yield from (Wide(160, four, 1, 1, two), Wide(192, four, 1, 1, two))
    if m <= MOST_NARROW:
        tall = Wide(128, eight, 1, 1, two)
        yield from (Wide(64, eight, 1, 1, two), replace(tall, step=1) if _is_single(tall, m, n, sm_count) else tall)
    if m <= 64:
        return
    if m <= MOST_NARROW:
        yield Wide(32, eight, 1, 2, two)
        pair = Wide(64, _unroll(blocks, 16, 1), 1, 2, 1)
        if k > 2048 or pair.tiles(m, n) > sm_count:  # in one short wave, one warpgroup a tile was 3 to 10 % faster
            yield pair
    if m <= 256:
        yield Wide(96, _unroll(blocks, 4, 1), 1, 2, 1)
    yield Wide(128, _unroll(blocks, 8, 1), 1, 2, 1, staging=_staging(128, out_bytes))
    yield Wide(192, _unroll(blocks, 8, 1), 1, 2, 1, "s", staging=_staging(192, out_bytes))
    yield _widest(k, out_bytes)
    if m >= MANY_ROWS:
        yield _tallest(out_bytes)


def _cut(whole: Wide, m: int, n: int, k: int, sm_count: int) -> Iterator[Wide]:
    """The same tiles in equal parts, as long as all of them run at once."""
    if whole.groups > 1 or whole.bn not in (32, 64):  # sums of larger tiles cost more than they bring
        return
    for parts in range(2, MOST_PARTS + 1):
        if whole.tiles(m, n) * parts <= sm_count and ceil_div(k, 128) >= 4 * parts:
            yield replace(whole, parts=parts)


def _swapped(m: int, n: int, k: int, sm_count: int) -> Iterator[Swap]:
    tokens = max(8, 1 << (m - 1).bit_length())
    blocks = ceil_div(k, 128)
    step = 2 if blocks % 2 == 0 else 1
    tiles = Swap(tokens).tiles(m, n)
    for split in range(1, MOST_SPLIT + 1):
        per_sm = ceil_div(tiles * split, sm_count)
        if split > 1 and (blocks < 4 * split or tiles * split > 2 * sm_count):
            continue
        if per_sm <= (3 if k > 1024 else 4):
            yield Swap(tokens, 1, split, per_sm, step)
    if tiles > sm_count and blocks >= 32:
        yield Swap(tokens, 1, 0, 1, step)


def ranked(m: int, n: int, k: int, sm_count: int, out_bytes: int = 2) -> list[Config]:
    """All of them, the one with the least predicted time first."""
    found: list[Config] = []
    for whole in _wide(m, n, k, sm_count, out_bytes):
        found += [whole, *_cut(whole, m, n, k, sm_count)]
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
        if config.bn == 128 and config.groups == 2:
            more.append(replace(config, way="t"))
    if m >= MANY_ROWS:  # many waves: how a tile is walked counts more than how it starts
        more += [replace(_widest(k, 2), together=32), replace(_widest(k, 2), unroll=4, early=False)]
        more += [_tallest(2), Wide(128, _unroll(blocks, 8, 1), 1, 2, 1, staging=128, pdl=False)]
    return list(dict.fromkeys([*best, *more]))
