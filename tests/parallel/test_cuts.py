"""Where dimensions are cut."""

import pytest

from blockscale.errors import ShapeError
from blockscale.parallel.cuts import cut, grain, scaled, shares


@pytest.mark.parametrize(
    ("size", "ranks", "block", "parts"),
    [
        (2048, 8, 128, [256] * 8),
        (576, 2, 128, [288, 288]),
        (192, 4, 128, [48] * 4),
        (320, 8, 128, [40] * 8),
        (7168, 16, 128, [448] * 16),
        (2048, 3, 128, [704, 704, 640]),
        (8192, 3, 128, [2816, 2688, 2688]),
        (320, 3, 128, [112, 112, 96]),
        (320, 2, 128, [160, 160]),
        (130, 1, 128, [130]),
        (24, 3, 1, [8, 8, 8]),
    ],
)
def test_block_boundaries_where_they_can_be_and_inside_where_not(size, ranks, block, parts):
    ranges = cut(size, ranks, block)
    assert [e - b for b, e in ranges] == parts
    assert [b for b, _ in ranges] == [0, *(e for _, e in ranges[:-1])]


def test_too_narrow_is_refused_with_the_numbers():
    with pytest.raises(ShapeError, match="63 elements over 9 ranks: a rank would hold less than 8"):
        cut(63, 9, 128)


def test_whole_things_are_shared_out_uneven():
    assert shares(8, 3) == ((0, 3), (3, 6), (6, 8))
    assert shares(2, 4) == ((0, 1), (1, 2), (2, 2), (2, 2))
    assert scaled(shares(3, 2), 64) == ((0, 128), (128, 192))


def test_the_grain_of_ranges_laid_end_to_end():
    assert grain(((288, 576),), 128) == 32
    assert grain(((0, 64), (192, 256)), 128) == 64
    assert grain(((128, 300),), 128) == 128  # a ragged end is no boundary
    assert grain(((0, 40), (320, 360)), 128) == 8
