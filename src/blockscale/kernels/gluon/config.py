"""Tiles and launch shapes of the Hopper kernels as pure data: nothing here knows torch or a device.

Memory and registers of an sm_90 SM: 227 KiB of shared memory for one program, 64 Ki registers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SHARED_BYTES = 232448
"""Shared memory that one program may have, in bytes; programs that share an SM have 1 KiB each less."""
_SCALE_BOX = 128  # bytes: 32 fp32 weight scales
_BARRIERS = 16  # bytes a stage: full and empty
_SLACK = 640  # bytes: alignment and the broadcast slot of the ticket


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def inverse(b: int) -> int:
    """2^32 / b, rounded down, in the bits of an int32: what `wide_tiles.py` divides by b with."""
    bits = min((1 << 32) // b, (1 << 32) - 1)
    return bits - (1 << 32) if bits >> 31 else bits


@dataclass(frozen=True)
class Wide:
    """A configuration of `wide.py`: tiles of `64 * groups` tokens x `bn` weight rows.

    bn: 16, 32, 64, 96, 128, 160, 192 or 256.
    way: how a warpgroup gets through the columns of its tile, see `wide_blocks.py`:
        "o" overlapped: one piece of at most 128 columns with two sets of partial products, or several pieces, bn 96,
            160 or 192, with one set each.
        "t" in turn: pieces of at most 128 columns, one set of partial products.
        "l" in turn, with weight scales by plain loads instead of TMA: room for a second slot of y. bn 128 or 256,
            step 1.
        "s" bn 192 as a piece of 128 and one of 64 columns, each with a set of partial products; cuts no tiles.
    unroll: k-blocks in the inner loop; overlapped, the tensor cores run dry after each round of it.
    parts: most programs that may share a tile of the last, partial wave; 1 cuts none.
    groups: consumer warpgroups, 1 to 3.
    step: k-blocks that are loaded and released together, 1, 2 or 4; divides ceil(K / 128).
    per_sm: programs that share an SM.
    staging: columns of y that a warpgroup can stage in shared memory; with all of a tile's it never waits for a store.
    pdl: start while the kernel before drains (programmatic dependent launch). early: and fetch weights meanwhile.
    together: rows of tiles that are walked together, see `wide_tiles.py`; 0 for as many as make a wave nearly square.
    """

    bn: int
    unroll: int = 4
    parts: int = 1
    groups: int = 2
    step: int = 1
    way: str = "o"
    per_sm: int = 1
    staging: int = 64
    pdl: bool = True
    early: bool = True
    together: int = 0

    def __str__(self) -> str:
        tail = f"-t{self.together}" if self.together else ""
        tail += "-nopdl" if not self.pdl else "" if self.early else "-late"
        return (
            f"wide-{self.bn}{self.way}-u{self.unroll}-p{self.parts}-g{self.groups}-s{self.step}-x{self.per_sm}"
            f"-y{self.staging}{tail}"
        )

    @property
    def piece(self) -> int:
        """Width of one piece: columns of one wgmma. Of the first, where the second is half as wide ("s")."""
        return 128 if self.way == "s" else min(self.bn & -self.bn, 128)

    @property
    def pieces(self) -> int:
        return 2 if self.way == "s" else self.bn // self.piece

    @property
    def in_turn(self) -> bool:
        """Whether warpgroups take turns at the tensor cores; a tile may leave while the next one begins then."""
        return self.way in "tl"

    @property
    def unit(self) -> int:
        """Columns of y that lie in one slot of the staging buffer."""
        return min(self.piece, 64 if self.way in "sl" or self.staging < 128 else 128)

    @property
    def slots(self) -> int:
        """Slots of the staging buffer that each warpgroup has. They divide a tile's units, so that a slot comes round
        after as many stores as there are slots: that is what a warpgroup waits for."""
        most = max(1, self.staging // self.unit)
        return max(d for d in range(1, most + 1) if self.bn // self.unit % d == 0)

    def stages(self, out_bytes: int) -> int:
        """Steps in flight, given the bytes of an element of y."""
        scale_rows = 0 if self.way == "l" else 2 if self.pieces > 1 else 1
        scales = 4 * (256 if self.groups == 3 else 64 * self.groups)
        stage = self.step * ((64 * self.groups + self.bn) * 128 + scales) + scale_rows * _SCALE_BOX + _BARRIERS
        budget = (SHARED_BYTES - 1024 * (self.per_sm - 1)) // self.per_sm - _SLACK
        return min(
            (16 if self.bn <= 32 else 12) // self.step,
            (budget - self.groups * 64 * self.slots * self.unit * out_bytes) // stage,
        )

    @property
    def registers(self) -> tuple[int, int]:
        """(cap of a thread at launch, what consumers get when those that send give theirs away)."""
        if self.groups > 1:
            return (168, 240) if self.groups == 2 else (128, 160)
        cap = min(224, 65536 // (256 * self.per_sm) // 8 * 8)
        return cap, min(240, (cap * 3 - 24) // 2 // 8 * 8)

    @property
    def tile_rows(self) -> int:
        """Rows of tiles that are walked together."""
        return self.together or (16 if self.bn >= 128 * self.groups else 8)

    def walk(self, m: int, n: int) -> tuple[int, int, int, int]:
        """(rows of tiles that are walked together; inverses of the tiles of such a group, of its rows, and of the rows
        of the last group)."""
        together, rows = self.tile_rows, ceil_div(m, 64 * self.groups)
        last = rows - (rows - 1) // together * together
        return together, inverse(together * ceil_div(n, self.bn)), inverse(together), inverse(last)

    def x_rows(self, m: int) -> int:
        """Rows of x that one TMA request brings: few that are not there, for TMA writes every row that it is asked for.
        wgmma multiplies what lies in the others all the same, and those rows of y are dropped."""
        rows = 64 * self.groups
        if self.groups == 3:
            return 64
        if m <= 32:
            return max(8, 1 << (m - 1).bit_length())
        return rows if m % rows == 0 else rows // 4

    def x_boxes(self, m: int) -> int:
        """Most requests for the x of a tile; of the last row of tiles those alone are made that there are rows for."""
        return 1 if m <= self.x_rows(m) else 64 * self.groups // self.x_rows(m)

    def tiles(self, m: int, n: int) -> int:
        return ceil_div(m, 64 * self.groups) * ceil_div(n, self.bn)


@dataclass(frozen=True)
class Grid:
    """How a wide launch deals its tiles: see `wide.py`."""

    programs: int
    full_waves: int
    dealt: int

    @property
    def cut_tiles(self) -> bool:
        return self.dealt > 0


def wide_grid(config: Wide, m: int, n: int, k: int, sm_count: int) -> Grid:
    """Persistent programs, waves of whole tiles and the programs that share the cut tiles (0: none are cut).

    Every program that shares a cut tile gets at least one step: a tile waits for all of its programs.
    """
    tiles, places = config.tiles(m, n), sm_count * config.per_sm
    full_waves, left = divmod(tiles, places)
    dealt = min(places, left * min(config.parts, ceil_div(k, 128) // config.step))
    if config.parts == 1 or dealt <= left or config.way == "s":
        return Grid(min(places, tiles), ceil_div(tiles, places), 0)
    return Grid(places if full_waves else dealt, full_waves, dealt)


def wide_floats(config: Wide, grid: Grid) -> int:
    """fp32 numbers of the partial tiles that a wide launch leaves: two for each program that shares tiles."""
    return grid.dealt * 2 * 64 * config.groups * config.bn


@dataclass(frozen=True)
class Swap:
    """A configuration of `swap.py`: tiles of 64 weight rows x `tokens` tokens.

    tokens: 8, 16, 32 or 64. groups: consumer warpgroups that share a tile, each taking every groups-th step of K.
    split: programs that share a tile, each with an equal part of K; 0 deals the steps of all tiles in equal ranges
        to as many programs as the GPU holds.
    per_sm: programs that share an SM. step: k-blocks that are loaded and released together; divides K / 128.
    """

    tokens: int
    groups: int = 1
    split: int = 1
    per_sm: int = 1
    step: int = 1
    pdl: bool = True

    def __str__(self) -> str:
        tail = "" if self.pdl else "-nopdl"
        return f"swap-{self.tokens}-g{self.groups}-k{self.split}-x{self.per_sm}-s{self.step}{tail}"

    @property
    def unroll(self) -> int:
        """k-blocks between two points where the tensor cores run dry; limited by the registers that it keeps alive."""
        return max(self.step, 2 if self.tokens == 64 and self.per_sm * self.groups > 2 else 4)

    @property
    def stages(self) -> int:
        stage = self.step * ((self.tokens + 64) * 128 + max(self.tokens, 32) * 4) + _SCALE_BOX + _BARRIERS
        scratch = self.groups * 64 * self.tokens * 4  # the output's layout conversion and the other groups' sums
        budget = (SHARED_BYTES - 1024 * (self.per_sm - 1)) // self.per_sm - _SLACK - scratch
        count = max(2, min(12 // self.step, budget // stage))
        # a stage must always be the same warpgroup's: a barrier's parity tells this fill from the one before, no more
        return count // self.groups * self.groups

    @property
    def registers(self) -> tuple[int, int]:
        """(cap of a thread at launch, what consumers get when those that send give theirs away)."""
        threads = (self.groups + 1) * 128
        cap = min(168 if self.groups == 2 else 224, 65536 // (threads * self.per_sm) // 8 * 8)
        return cap, min(240, (cap * 3 - 24) // 2 // 8 * 8)

    def tiles(self, m: int, n: int) -> int:
        return ceil_div(n, 64) * ceil_div(m, self.tokens)

    def programs(self, m: int, n: int, k: int, sm_count: int) -> int:
        tiles = self.tiles(m, n)
        if self.split:
            return tiles * self.split
        return min(sm_count * self.per_sm, tiles * (ceil_div(k, 128) // self.step))

    def floats(self, programs: int) -> int:
        """fp32 numbers of the partial tiles that a launch of so many programs leaves."""
        return 0 if self.split == 1 else programs * (1 if self.split else 2) * 64 * self.tokens


Config = Wide | Swap


def floats(config: Config, m: int, n: int, k: int, sm_count: int) -> int:
    """fp32 numbers of the partial tiles that a launch of this configuration leaves."""
    if isinstance(config, Wide):
        return wide_floats(config, wide_grid(config, m, n, k, sm_count))
    return config.floats(config.programs(m, n, k, sm_count))


_TEXT = re.compile(
    r"wide-(\d+)([ostl])-u(\d+)-p(\d+)-g(\d+)-s(\d+)-x(\d+)-y(\d+)(?:-t(\d+))?(-nopdl|-late)?"
    r"|swap-(\d+)-g(\d+)-k(\d+)-x(\d+)-s(\d+)(-nopdl)?"
)


def parse(text: str) -> Config:
    """Read what `str(config)` wrote: "wide-128o-u8-p1-g2-s1-x1-y64", "swap-16-g1-k4-x2-s2"."""
    match = _TEXT.fullmatch(text)
    if not match:
        example = "'wide-128o-u8-p1-g2-s1-x1-y64' or 'swap-16-g1-k4-x2-s2'"
        raise ValueError(f"configuration: got {text!r}, need e.g. {example}")
    if match[1]:
        bn, way, *rest = match.groups()[:8]
        unroll, parts, groups, step, per_sm, staging = map(int, rest)
        pdl, early = match[10] != "-nopdl", match[10] is None
        return Wide(int(bn), unroll, parts, groups, step, way, per_sm, staging, pdl, early, int(match[9] or 0))
    tokens, groups, split, per_sm, step = map(int, match.groups()[10:15])
    return Swap(tokens, groups, split, per_sm, step, pdl=not match[16])
