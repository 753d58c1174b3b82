"""Which configuration a shape gets: a pure function of (m, n, k, SMs), from a model of the chip.

The model, in cycles of an SM (fitted on one H200, bench/results/hopper-notes.md): the tensor cores are fed from shared
memory at 128 bytes a cycle, and what TMA writes there shares that rate. A k-block of a 128 x bn tile is read once by
wgmma (x by both warpgroups together once, w by each of them) and written once by TMA: 256 + 3 bn cycles, against
4 bn that the tensor cores themselves need. So wide tiles are better until the last wave is badly filled.
"""

from __future__ import annotations

from .config import Config, Swap, Wide, ceil_div, wide_grid

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
    """(predicted microseconds, configuration), best first: every configuration that could be worth a measurement."""
    k_blocks = ceil_div(k, 128)
    found: list[tuple[float, Config]] = []
    if m > 32:
        for bn, unroll in ((32, 8), (64, 8), (128, 8), (192, 4), (256, 2)):
            for parts in (1, 2, 3, 4, 6, 8):
                config = Wide(bn, min(unroll, 4) if k_blocks < 8 or k_blocks % 8 else unroll, parts)
                if parts > 1 and (not wide_grid(config, m, n, k, sm_count).cut_tiles or parts > k_blocks):
                    continue
                if any(
                    isinstance(c, Wide)
                    and c.bn == bn
                    and wide_grid(c, m, n, k, sm_count) == wide_grid(config, m, n, k, sm_count)
                    for _, c in found
                ):
                    continue
                found.append((wide_us(config, m, n, k, sm_count), config))
    if m <= 64:
        tokens = max(8, 1 << (m - 1).bit_length())
        step = 2 if k_blocks % 2 == 0 else 1
        for split in (1, 2, 3, 4, 6, 8):
            if split > max(1, k_blocks // step // 2):
                continue
            for groups in (1, 2):
                most = (4 if tokens <= 32 else 3) // groups
                per_sm = min(ceil_div(Swap(tokens).tiles(m, n) * split, sm_count), most)
                config = Swap(tokens, groups, split, per_sm, step)
                found.append((swap_us(config, m, n, k, sm_count), config))
    return sorted(found, key=lambda pair: (pair[0], str(pair[1])))


def choose(m: int, n: int, k: int, sm_count: int) -> Config:
    """The configuration for a shape."""
    return candidates(m, n, k, sm_count)[0][1]
