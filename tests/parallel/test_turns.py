"""The order in which rows are multiplied whose sums travel."""

import pytest

from blockscale.parallel import turns
from blockscale.parallel.cuts import shares


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("processors", [0, 132])
@pytest.mark.parametrize("rows", [8, 4096, 4099])
def test_regions_are_all_rows_once_and_end_with_the_ranks_own(ranks, processors, rows):
    owners = shares(rows, ranks)
    for rank in range(ranks):
        found = turns.regions(owners, rank, 7168, processors)
        assert sorted(row for b, e in found for row in (b, e))[1:-1:2] == sorted(b for b, _ in found)[1:]
        assert sum(e - b for b, e in found) == rows
        begin, end = found[-1]
        assert owners[rank][0] <= begin
        assert end <= owners[rank][1]
        assert end - begin >= 0.6 * (owners[rank][1] - owners[rank][0])


def test_own_rows_join_where_that_saves_a_wave():
    assert turns.regions(shares(4096, 2), 0, 7168, 132) == [(1792, 4096), (0, 1792)]  # 4 + 3 waves, not 4 + 4
    assert turns.regions(shares(4096, 2), 1, 7168, 132) == [(0, 2304), (2304, 4096)]
    assert turns.regions(shares(8192, 2), 0, 7168, 132) == [(4096, 8192), (0, 4096)]  # 7 + 7
    assert turns.regions(shares(4096, 2), 0, 7168, 0) == [(2048, 4096), (0, 2048)]


@pytest.mark.parametrize(("fits", "count"), [(5, 1), (4, 2), (2, 3), (1, 5)])
def test_rounds_are_alike_and_hold_every_row(fits, count):
    owners = shares(9, 2)
    found = turns.rounds(owners, fits)
    assert len(found) == count
    assert max(e - b for now in found for b, e in now) <= fits
    for rank, (begin, end) in enumerate(owners):
        assert [row for now in found for row in range(*now[rank])] == list(range(begin, end))
