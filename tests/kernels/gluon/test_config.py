"""Configurations are plain data: their budgets, grids and names, as literal tables."""

import pytest

from blockscale.kernels.gluon.config import SHARED_BYTES, Grid, Swap, Wide, inverse, parse, wide_grid


@pytest.mark.parametrize(
    ("config", "out_bytes", "stages"),
    [
        (Wide(128, 8), 2, 6),
        (Wide(128, 8), 4, 5),  # fp32 results take the memory of a stage
        (Wide(128, 8, step=2), 2, 3),
        (Wide(256, 2, way="t"), 2, 4),
        (Wide(256, 8, way="t", staging=256), 2, 3),
        (Wide(192, 4, way="s", staging=192), 2, 4),
        (Wide(128, 4, way="t", groups=1, per_sm=2), 2, 4),
        (Wide(64, 8), 2, 8),
        (Wide(128, 8, way="t", groups=3), 2, 4),
        (Wide(256, 4, way="l", staging=128), 2, 4),  # room for 128 staged columns: no weight scales in shared memory
        (Wide(32, 8, groups=1), 2, 16),
    ],
)
def test_stages_of_wide_tiles(config: Wide, out_bytes: int, stages: int) -> None:
    assert config.stages(out_bytes) == stages


@pytest.mark.parametrize(
    ("config", "pieces", "units"),  # (how many, width) of the pieces; (slots, width) of the staging buffer
    [
        (Wide(128), (1, 128), (1, 64)),
        (Wide(128, staging=128), (1, 128), (1, 128)),
        (Wide(256, way="t", staging=256), (2, 128), (2, 128)),
        (Wide(192, way="s", staging=192), (2, 128), (3, 64)),
        (Wide(256, way="l", staging=128), (2, 128), (2, 64)),
        (Wide(96, staging=96), (3, 32), (3, 32)),
        (Wide(96), (3, 32), (1, 32)),  # two slots would not come round in step with three units
        (Wide(160), (5, 32), (1, 32)),
        (Wide(32), (1, 32), (1, 32)),
    ],
)
def test_pieces_and_staging(config: Wide, pieces: tuple[int, int], units: tuple[int, int]) -> None:
    assert (config.pieces, config.piece) == pieces
    assert (config.slots, config.unit) == units


@pytest.mark.parametrize(
    ("config", "m", "rows", "boxes"),
    [
        (Wide(64, groups=1), 1, 8, 1),
        (Wide(64, groups=1), 17, 32, 1),
        (Wide(64, groups=1), 40, 16, 4),  # three are asked for
        (Wide(64, groups=1), 64, 64, 1),
        (Wide(64, groups=1), 200, 16, 4),
        (Wide(64, groups=2), 20, 32, 1),
        (Wide(64, groups=2), 65, 32, 4),
        (Wide(64, groups=2), 512, 128, 1),
        (Wide(64, groups=2), 520, 32, 4),
        (Wide(128, groups=3), 8, 64, 1),  # boxes of 64 rows, whatever there is: 192 is no power of two
        (Wide(128, groups=3), 4096, 64, 3),
    ],
)
def test_x_comes_in_boxes_that_hold_few_rows_that_are_not_there(config: Wide, m: int, rows: int, boxes: int) -> None:
    assert (config.x_rows(m), config.x_boxes(m)) == (rows, boxes)


@pytest.mark.parametrize("per_sm", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_programs_that_share_an_sm_fit_its_memory_and_registers(tokens: int, per_sm: int) -> None:
    config = Swap(tokens, per_sm=per_sm)
    stage = (tokens + 64) * 128 + max(tokens, 32) * 4 + 128 + 16
    assert config.stages >= 2
    assert per_sm * (config.stages * stage + 64 * tokens * 4 + 1024) <= SHARED_BYTES
    cap, consumers = config.registers
    assert cap * 256 * per_sm <= 65536
    assert consumers >= cap


@pytest.mark.parametrize(
    ("config", "shape", "grid"),
    [
        (Wide(128), (128, 1024, 4096), Grid(8, 1, 0)),  # eight tiles, eight programs
        (Wide(128), (4096, 7168, 2048), Grid(132, 14, 0)),  # 1792 tiles in 14 waves
        (Wide(128, parts=4), (4096, 7168, 2048), Grid(132, 13, 132)),  # the last 76 tiles are cut for everybody
        (Wide(64, parts=4), (128, 2112, 7168), Grid(132, 0, 132)),  # 33 tiles, four programs each
        (Wide(64, parts=3), (128, 2112, 7168), Grid(99, 0, 99)),
        (Wide(64, parts=8), (128, 128, 256), Grid(4, 0, 4)),  # two tiles of two steps: no more than two programs each
        (Wide(128, parts=4), (128, 132 * 128, 512), Grid(132, 1, 0)),  # nothing is left to cut
    ],
)
def test_grids(config: Wide, shape: tuple[int, int, int], grid: Grid) -> None:
    assert wide_grid(config, *shape, 132) == grid


@pytest.mark.parametrize(
    "text",
    [
        "wide-128o-u8-p1-g2-s1-x1-y64",
        "wide-256t-u4-p3-g1-s1-x2-y128-nopdl",
        "wide-256l-u1-p1-g2-s1-x1-y128-t32-late",
        "swap-16-g1-k4-x2-s2",
        "swap-8-g2-k0-x1-s1-nopdl",
    ],
)
def test_names_round_trip(text: str) -> None:
    assert str(parse(text)) == text


def test_a_name_that_is_none_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match="got 'wide-128', need e.g. 'wide-128o-u8-p1-g2-s1-x1-y64'"):
        parse("wide-128")


@pytest.mark.parametrize("b", [1, 2, 3, 7, 8, 16, 17, 132, 264, 4095, 4096, 65537, 2**20 + 1, 2**31 - 1])
def test_a_division_by_its_inverse_is_exact(b: int) -> None:
    bits = inverse(b) % 2**32  # as the kernel reads it
    assert -(2**31) <= inverse(b) < 2**31
    edges = [0, 1, b - 1, b, b + 1, 2 * b - 1, 131 * b, 131 * b - 1, 2**31 - 1, 2**31 - 1 - b]
    for a in [a for a in edges if a < 2**31]:
        quotient = a * bits >> 32
        assert quotient + (a - quotient * b >= b) == a // b


def test_the_rows_of_the_last_group_are_walked_by_their_own_number() -> None:
    together, group, rows, last = Wide(256, 4, way="l").walk(m=128 * 21, n=256 * 5)
    assert (together, group, rows, last) == (16, inverse(16 * 5), inverse(16), inverse(5))
    assert Wide(256, 4, way="l").walk(m=128 * 16, n=256)[3] == inverse(16)
