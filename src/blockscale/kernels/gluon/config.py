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
_SLACK = 1024  # bytes: alignment and the broadcast slot of the ticket


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Wide:
    """A configuration of `wide.py`: tiles of `64 * groups` tokens x `bn` weight rows.

    bn: 32, 64, 128 (one piece, x from shared memory), 192 or 256 (pieces of 64, x from registers).
    unroll: k-blocks between two points where the tensor cores run dry.
    parts: most programs that may share a tile of the last, partial wave; 1 cuts none.
    groups: consumer warpgroups, 2 or 3.
    step: k-blocks that are loaded and released together, 1, 2 or 4; divides ceil(K / 128).
    pdl: start while the kernel before drains (programmatic dependent launch).
    """

    bn: int
    unroll: int = 4
    parts: int = 1
    groups: int = 2
    step: int = 1
    pdl: bool = True

    def __str__(self) -> str:
        tail = "" if self.pdl else "-nopdl"
        return f"wide-{self.bn}-u{self.unroll}-p{self.parts}-g{self.groups}-s{self.step}{tail}"

    @property
    def pieces(self) -> int:
        return self.bn // 64 if self.bn > 128 else 1

    @property
    def piece(self) -> int:
        """Width of one piece: columns of one wgmma."""
        return self.bn // self.pieces

    @property
    def staging(self) -> int:
        """Columns of y that a warpgroup stages in shared memory at a time."""
        return min(self.piece, 64)

    def stages(self, out_bytes: int) -> int:
        """Steps in flight, given the bytes of an element of y."""
        scale_rows = 2 if self.pieces > 1 else 1
        scales = 4 * (256 if self.groups == 3 else 128)
        stage = self.step * ((64 * self.groups + self.bn) * 128 + scales) + scale_rows * _SCALE_BOX + _BARRIERS
        return min(10, (SHARED_BYTES - _SLACK - self.groups * 64 * self.staging * out_bytes) // stage)

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
    tiles = config.tiles(m, n)
    full_waves, left = divmod(tiles, sm_count)
    dealt = min(sm_count, left * min(config.parts, ceil_div(k, 128) // config.step))
    if config.parts == 1 or dealt <= left:
        return Grid(min(sm_count, tiles), ceil_div(tiles, sm_count), 0)
    return Grid(sm_count if full_waves else dealt, full_waves, dealt)


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
        """(cap of a thread at launch, what consumers get when the producer gives its own away)."""
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


Config = Wide | Swap
_TEXT = re.compile(r"wide-(\d+)-u(\d+)-p(\d+)-g(\d+)-s(\d+)(-nopdl)?|swap-(\d+)-g(\d+)-k(\d+)-x(\d+)-s(\d+)(-nopdl)?")


def parse(text: str) -> Config:
    """Read what `str(config)` wrote: "wide-128-u8-p1-g2-s1", "swap-16-g1-k4-x2-s2"."""
    match = _TEXT.fullmatch(text)
    if not match:
        raise ValueError(f"configuration: got {text!r}, need e.g. 'wide-128-u8-p1-g2-s1' or 'swap-16-g1-k4-x2-s2'")
    if match[1]:
        bn, unroll, parts, groups, step = map(int, match.groups()[:5])
        return Wide(bn, unroll, parts, groups, step, pdl=not match[6])
    tokens, groups, split, per_sm, step = map(int, match.groups()[6:11])
    return Swap(tokens, groups, split, per_sm, step, pdl=not match[12])
