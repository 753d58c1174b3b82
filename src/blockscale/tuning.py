"""Tile choice: pure functions from a shape, M and a platform to a config, over measured tables.

Every choice carries `entry`, the name of the table row it came from, so that `explain` and benchmarks can say which
was used. `Measured` rows come from a timed run on that device; `compiled` rows were only compiled ahead of time for
it (`bench/aot.py`: no spills where the compiler reports them) and nobody has timed them yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from .platform import Platform

GemmPath = Literal[
    "tma", "tma16", "native", "codec", "codec_fold", "decoded", "weight_only", "weight_only_fold", "dense"
]  # fmt: skip
"""How a multiplication reads its operands: FP8 by block copies, FP8 by pointers, bytes decoded in the loop, bytes
decoded to 16 bits beforehand ("tma16": those by block copies), 16-bit activations with weights decoded in the loop.
"fold": scales of short groups are multiplied into an operand there, which needs registers. "dense": before that."""

_REMEMBERED = 1 << 12  # choices: a choice takes some 20 us, and eager calls ask for the same one again and again
SMALL_M = 64
"""Up to here one tile holds all rows, and K is split to occupy the chip."""
_CACHED = 16 << 20
"""Elements of 16 bits that an L2 cache of 40 MB and more keeps beside x."""


class QuantizeTile(NamedTuple):
    """rows, groups: of one program. warps: of 32 (64 on CDNA) lanes. entry: where the choice came from."""

    rows: int
    groups: int
    warps: int
    entry: str


@dataclass(frozen=True)
class GemmTile:
    """A multiplication's config.

    bm, bn, bk: tile in rows of x, rows of w, and elements of K. split: slices of K. swap: weight rows take the M side
    of the instruction. group_m: tile rows that run side by side. programs: persistent programs a multiprocessor, 0 for
    one program a tile. halves: 2 multiplies the upper and the lower half of bm one after the other. rescaled: one
    sum in units of the scale at hand, not products and a sum. entry: the row of a table that it came from.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    entry: str
    split: int = 1
    swap: bool = False
    group_m: int = 8
    programs: int = 0
    halves: int = 1
    rescaled: bool = False


@lru_cache(_REMEMBERED)
def quantize_tile(rows: int, groups: int, group: int, platform: Platform, *, scales_by_column: bool) -> QuantizeTile:
    """Tile of a group quantization: `rows` x `groups` groups of `group` elements.

    Few rows want many programs; many want long contiguous reads, or several rows where scales lie by column.
    Source: one H100, 1x128, M=8192 K=7168: 98% of copy bandwidth with 4x8 and 8x8 groups of 8 warps."""
    width = _pow2(group)
    if rows <= 16:
        return QuantizeTile(1, min(max(512 // width, 1), _pow2(groups)), 4, "quantize: few rows")
    name = "quantize: column scales" if scales_by_column else "quantize: row scales"
    if platform.capability >= 80:
        tile_rows, elements, warps = (8, 8192, 8) if scales_by_column else (4, 4096, 8)
    else:
        tile_rows, elements, warps = (8 if scales_by_column else 2), 4096, 4
    return QuantizeTile(tile_rows, min(max(elements // (width * tile_rows), 1), _pow2(groups)), warps, name)


@dataclass(frozen=True)
class _Timed:
    """A tile of Hopper's block copies and how long it takes: `waves * resident * bm * bn * (k + ends) / rate`.

    resident: programs side by side on a multiprocessor. ends: what begins and ends a tile, as elements of K. rates:
    relative speeds with FP8 and with 16-bit operands, 0 where it does not serve. Fitted on one H100 (M=4096, N and K of
    DeepSeek-V3's linears) to within 8%: larger tiles ask the L2 cache for less, smaller ones waste less of a wave.
    """

    tile: GemmTile
    resident: int
    ends: int
    rates: tuple[float, float]

    def cost(self, path: str, m: int, n: int, k: int, sms: int) -> float:
        t = self.tile
        waves = -(-(-(-m // t.bm) * -(-n // t.bn)) // (self.resident * sms))
        return waves * self.resident * t.bm * t.bn * (k + self.ends) / self.rates[path == "tma16"]


_TIMED = (
    _Timed(GemmTile(128, 64, 128, 4, 4, "two programs", programs=2), 2, 200, (3.5, 2.9)),
    _Timed(GemmTile(128, 64, 128, 4, 3, "three programs", programs=3), 3, 34, (3.64, 3.0)),
    _Timed(GemmTile(128, 128, 128, 4, 3, "halves", group_m=16, halves=2), 2, 350, (4.47, 4.47)),
    _Timed(GemmTile(128, 128, 128, 4, 3, "rescaled", rescaled=True, programs=2), 2, 87, (0.0, 5.0)),
)

# (family, path) -> bm, bn, bk, warps, stages for many rows. "*" serves families without a row of their own.
_LARGE: dict[tuple[str, str], tuple[int, int, int, int, int]] = {
    ("sm_90", "tma"): (128, 64, 128, 4, 4),
    ("sm_90", "tma16"): (128, 64, 64, 4, 4),
    ("sm_90", "native"): (128, 128, 128, 8, 3),
    ("sm_90", "decoded"): (128, 128, 128, 8, 3),
    ("sm_90", "codec"): (64, 128, 128, 4, 3),
    ("sm_90", "weight_only"): (64, 128, 128, 4, 3),
    ("sm_90", "codec_fold"): (128, 128, 128, 8, 3),
    ("sm_90", "weight_only_fold"): (128, 128, 64, 8, 3),
    ("sm_90", "dense"): (128, 128, 64, 8, 3),
    ("sm_100", "tma"): (128, 128, 128, 8, 4),
    ("sm_100", "tma16"): (128, 128, 64, 8, 4),
    ("sm_100", "native"): (128, 128, 128, 8, 3),
    ("sm_80", "decoded"): (128, 128, 128, 8, 3),
    ("sm_75", "weight_only"): (64, 32, 32, 8, 2),
    ("sm_75", "weight_only_fold"): (32, 32, 32, 8, 2),
    ("sm_75", "*"): (64, 64, 32, 8, 2),
    ("cdna", "*"): (128, 128, 64, 8, 2),
    ("rdna", "*"): (64, 64, 64, 4, 2),
    ("xpu", "*"): (64, 128, 32, 16, 2),
    ("dg2", "*"): (64, 32, 32, 16, 2),  # no matrix instruction from Intel's Triton: more than 4 sums a lane spill
    ("cpu", "*"): (32, 32, 64, 4, 1),  # Triton's interpreter
    ("*", "native"): (128, 128, 128, 8, 2),
    ("*", "codec"): (64, 128, 128, 4, 3),
    ("*", "codec_fold"): (128, 128, 32, 8, 3),
    ("*", "weight_only"): (64, 128, 128, 4, 3),
    ("*", "*"): (128, 128, 64, 8, 2),
}
# (family, path) -> bn, bk, warps, stages, swap for up to SMALL_M rows; bm is M rounded up.
_SMALL: dict[tuple[str, str], tuple[int, int, int, int, bool]] = {
    ("sm_90", "tma"): (64, 128, 4, 5, True),
    ("sm_90", "native"): (64, 128, 4, 4, True),
    ("sm_90", "codec"): (64, 128, 4, 4, False),
    ("sm_90", "weight_only"): (64, 128, 4, 4, False),
    ("sm_80", "codec"): (64, 128, 4, 4, False),
    ("sm_80", "weight_only"): (64, 128, 4, 4, False),
    ("sm_100", "*"): (64, 128, 4, 4, False),
    ("sm_75", "*"): (64, 32, 8, 2, False),
    ("cdna", "*"): (64, 128, 4, 2, False),
    ("rdna", "*"): (64, 64, 4, 2, False),
    ("xpu", "*"): (64, 32, 8, 2, False),
    ("dg2", "*"): (32, 32, 16, 2, False),
    ("*", "*"): (64, 128, 4, 3, False),
}
_MEASURED = {"sm_90"}
_SMS = {"sm_75": 40, "sm_80": 108, "sm_86": 82, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170,
        "gfx90a": 104, "gfx942": 304, "gfx950": 256, "gfx1100": 96, "gfx1201": 64}  # fmt: skip


def family(platform: Platform) -> str:
    """Platforms that share a table row: "sm_90", "cdna", …"""
    if platform.kind == "cuda":
        known = [c for c in (75, 80, 90, 100) if c <= platform.capability]
        exact = {86: "sm_86", 89: "sm_89", 120: "sm_120", 121: "sm_120"}
        return exact.get(platform.capability) or f"sm_{known[-1] if known else 75}"
    if platform.kind == "rocm":
        return "cdna" if platform.arch.startswith("gfx9") else "rdna"
    return "dg2" if platform.kind == "xpu" and platform.arch == "dg2" else platform.kind


def multiprocessors(platform: Platform) -> int:
    """Programs that run side by side at least: what the device says, else the usual chip of that name."""
    said = platform.value("sms")
    return int(said) if said else _SMS.get(platform.arch, 64)


def by_pointers(m: int, n: int, platform: Platform) -> bool:
    """Whether few rows are read by pointers where block copies would do: asynchronous copies of 16 bytes need no
    descriptor fetched first and no padding to 16 rows. Source: one H100, N and K of DeepSeek-V3's linears. M = 1 and
    16: 1-9% faster in nine of ten; M = 32 and 64, where 64 weight rows a multiprocessor are all of them: 1-7%."""
    return family(platform) == "sm_90" and (m <= 16 or (m <= SMALL_M and n <= 64 * multiprocessors(platform)))


def decoded_rows(m: int, n: int, k: int, block_rows: int, platform: Platform) -> int:
    """Weight rows that are decoded to 16 bits and multiplied before the next are: what lies in the L2 cache until it is
    read (32 MiB), but enough for two programs of 128 x 128 a multiprocessor. It bounds the memory of a call, too.

    Whole blocks of scales and tiles, slices alike. Source: one H100, M=4096: 1585 us instead of 1656 at 7168x16384."""
    unit = math.lcm(128, block_rows)
    wave = -(-2 * multiprocessors(platform) * 128 * 128 // m)
    slices = -(-n // max(_CACHED // k, wave, unit))
    return -(-n // (slices * unit)) * unit


@lru_cache(_REMEMBERED)
def gemm_tile(
    path: GemmPath, m: int, n: int, k: int, span: int, platform: Platform, *, invariant: bool = False
) -> GemmTile:
    """Config for `[m, k] x [n, k]`; span: K elements that share scales, 0 for all.

    invariant: one config for every m, so that a row's result has the same bytes whatever batch it is in.
    """
    if m <= SMALL_M and not invariant:
        return _small(path.removesuffix("_fold"), m, n, k, span, platform)
    name = family(platform)
    key, (bm, bn, bk, warps, stages) = _find(_LARGE, name, path)
    tile = GemmTile(
        bm, bn, bk, warps, stages, _entry(name, key, "large"), programs=2 if path in ("tma", "tma16") else 0
    )
    if key in (("sm_90", "tma"), ("sm_90", "tma16")) and m > 128 and not invariant:
        serve = [t for t in _TIMED if t.rates[path == "tma16"]]
        best = min(serve, key=lambda t: t.cost(path, m, n, k, multiprocessors(platform))).tile
        return replace(best, bk=bk, entry=f"{tile.entry}, {best.entry}")
    if m <= 128 and not invariant:  # half the rows: twice the programs
        warps = tile.warps if platform.kind == "xpu" else min(tile.warps, 4)  # Intel's spill with fewer
        bn = 64 if path in ("codec", "weight_only") and platform.capability >= 80 else tile.bn
        tile = replace(tile, bm=min(tile.bm, 64), bn=bn, warps=warps, entry=tile.entry + ", M <= 128")
    elif m <= 256 and not invariant and key in (("sm_90", "codec"), ("sm_90", "weight_only")):
        tile = replace(tile, bm=128, bn=64, entry=tile.entry + ", M <= 256")
    tile = _fit(tile, k, span)
    if name == "sm_75" and 0 < span <= 32:  # a scale for each row of either operand in every step
        tile = replace(tile, bm=32, bn=32, entry=f"{tile.entry}, short groups")
    if name in ("sm_90", "sm_100") and tile.bk < 64 < tile.bn:  # 4 warps: Triton 3.6 and 3.7 refuse their own layout
        tile = replace(tile, warps=8)
    split_rows = 128 if name == "sm_90" else 256  # 256 rows fill an H100 with 128x64 tiles: halves of K cost 12 %
    if m <= split_rows and not invariant and path in ("codec", "weight_only") and platform.capability >= 80:
        tiles = -(-m // tile.bm) * -(-n // tile.bn)
        tile = replace(tile, split=_split(tiles, -(-k // tile.bk), multiprocessors(platform)))
    return tile


def _small(path: str, m: int, n: int, k: int, span: int, platform: Platform) -> GemmTile:
    name = family(platform)
    key, (bn, bk, warps, stages, swap) = _find(_SMALL, name, path)
    bm = max(_pow2(m), 16)
    bn = min(bn, 64) if bm > 32 else bn  # more sums than that spill
    tile = GemmTile(bm, bn, bk, warps, stages, _entry(name, key, "small"), swap=swap)
    tile = _fit(tile, k, span)
    if path == "tma" and n > 2 * tile.bn * multiprocessors(platform):
        tile = replace(tile, bn=2 * tile.bn, stages=4, entry=f"{tile.entry}, wide")
    few = path == "native" and by_pointers(m, n, platform) and tile.bk >= 128
    if m <= 8 and (few or path in ("codec", "weight_only")) and platform.capability >= 80 and tile.bk >= 128:
        tile = replace(tile, bm=8, swap=True, entry=f"{tile.entry}, M <= 8")  # the instruction's other side is 8 wide
    tiles, steps, sms = -(-n // tile.bn), -(-k // tile.bk), multiprocessors(platform)
    if few:
        return _few(tile, m, tiles, steps, sms)
    tile = replace(tile, split=_split(tiles, steps, sms))
    if path == "codec" and tile.split == 1 and k <= 2048 and platform.capability in (80, 90):
        tile = replace(tile, stages=6, entry=f"{tile.entry}, K <= 2048")
    return tile


def _few(tile: GemmTile, m: int, tiles: int, steps: int, sms: int) -> GemmTile:
    """Slices of K and stages for FP8 by pointers: deep pipelines where a multiprocessor has one program, which it has
    where tiles occupy half of them, or from 9 rows on, whose partial sums cost more.

    Fitted on one H100 (N, K of DeepSeek-V3's linears, M = 1 and 16): within 2% of the best of 10-24 tiles."""
    split = 1 if 2 * tiles > sms else _split(tiles, steps, sms)
    if m > 8 and split > 1 and tiles * split > sms:
        split //= 2
    alone = tiles * split <= sms
    deep = 6 if m > 16 else 8 if steps >= 32 * split else 7
    return replace(tile, split=split, stages=deep if alone else 4, entry=tile.entry + (", alone" if alone else ""))


def _split(tiles: int, steps: int, sms: int) -> int:
    """Slices of K: as many as give every multiprocessor two programs, none shorter than seven steps, and one where a
    short sum (16 steps) occupies half of them.

    Fitted on one H200 and one H100 (N, K of DeepSeek-V3's linears, M = 1, 16): within 3% of the best of 1, 2, 4, 8."""
    split = 1
    if steps <= 16 and 2 * tiles > sms:
        return split
    while split < 16 and tiles * split <= sms and steps // (2 * split) >= 7:
        split *= 2
    return split


def _fit(tile: GemmTile, k: int, span: int) -> GemmTile:
    """Cut the step to a power of two that the span needs (32 is the shortest that every instruction takes), and tiles
    whose rows start unaligned, which are read byte by byte, to what does not spill."""
    if k % 16:
        tile = replace(tile, bn=min(tile.bn, 64), bk=min(tile.bk, 64), entry=f"{tile.entry}, unaligned")
    if span and span < tile.bk:
        tile = replace(tile, bk=max(_pow2(span), 32), entry=f"{tile.entry}, span {span}")
    return tile


def _find(table: dict[tuple[str, str], tuple], name: str, path: str) -> tuple[tuple[str, str], tuple]:  # type: ignore[type-arg]
    for key in ((name, path), (name, path.removesuffix("_fold")), (name, "*"), ("*", path), ("*", "*")):
        if key in table:
            return key, table[key]
    raise AssertionError("the table has a row for everything")


def _entry(name: str, key: tuple[str, str], size: str) -> str:
    how = "measured" if key[0] in _MEASURED else "compiled"
    return f"gemm {size}: {how}, {key[0] if key[0] != '*' else 'any'}/{key[1]} (for {name})"


def _pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
