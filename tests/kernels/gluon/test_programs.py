"""What every program of a launch sends for and stores, by running the compiled code without a GPU: each operand of each
tile once and in one order, each part of the result once, and no warp waits for ever.

That is what a wrong schedule, a barrier's count or a compiler's mistake breaks first, and on a GPU as a hang.
"""

import sys
from collections import Counter
from itertools import groupby, product
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")
sys.path.insert(0, str(Path(__file__).parent))

from programs import Deadlock, Move, Program, Run

from aot import chosen, launch
from blockscale.kernels.gluon.config import Config, Wide, ceil_div, parse
from blockscale.kernels.gluon.workers import ragged_shapes

Shape = tuple[int, int, int]


def _tile(config: Config) -> tuple[int, int]:
    """(rows, columns) of y."""
    return (64 * config.groups, config.bn) if isinstance(config, Wide) else (config.tokens, 64)


def _walk(moves: list[Move], size: int) -> list[tuple[int, int]]:
    """(tile, k-block) in the order in which a program asks for a matrix's boxes; those of a tile follow each other."""
    return [key for key, _ in groupby((move.at[1] // size, move.at[0] // 128) for move in moves)]


def _sent(program: Program, *names: str) -> list[Move]:
    return [move for move in program.sent if move.what in names]


def _few(config: Config) -> list[Shape]:
    """A ragged launch of one wave, and one of several."""
    shapes = list(ragged_shapes(config))
    return [shapes[0], shapes[3]] if isinstance(config, Wide) else shapes[:2]


def _check_launch(config: Config, shape: Shape, early: bool, seed: int) -> None:
    m, n, k = shape
    rows, columns = _tile(config)
    run = Run(launch(config, m, n, k, early=early))
    ld = -(-m // 4) * 4  # of the scales of x
    multiplied: Counter[tuple[int, int, int]] = Counter()
    stored: Counter[tuple[int, int]] = Counter()
    for program in run.execute(seed):
        x, w = _walk(_sent(program, "x_desc"), rows), _walk(_sent(program, "w_desc", "wq_desc"), columns)
        assert [kb for _, kb in x] == [kb for _, kb in w], f"program {program.pid}"
        assert [(at % ld // rows, at // ld) for (at,) in (move.at for move in _sent(program, "xs_desc"))] == x
        waiting = _sent(program, "x_desc", "xs_desc") if early else program.sent
        assert not config.pdl or all(move.after_wait for move in waiting), (
            "asked for before the kernel before has ended"
        )
        assert all(b.bytes == 0 and b.pending == b.count for b in program.barriers.values()), "left half way"
        multiplied.update((row, column, kb) for (row, kb), (column, _) in zip(x, w, strict=True))
        stored.update(move.at for move in program.stored if move.at[1] < m and move.at[0] < n)
        stored.update(divmod(run.offset(at) // 2, n)[::-1] for at in program.written if run.name(at) == "y_ptr")
    tiles = list(product(range(ceil_div(m, rows)), range(ceil_div(n, columns)), range(ceil_div(k, 128))))
    assert multiplied == Counter(tiles)
    assert set(stored.values()) == {1}, "part of y twice"
    assert {(row // rows, column // columns) for column, row in stored} == {tile[:2] for tile in tiles}
    if isinstance(config, Wide):
        assert set(stored) == set(product(range(0, n, min(config.unit, 64)), range(0, m, 64)))  # 128 bytes a row
    assert not any(value for at, value in run.memory.items() if run.name(at) == "tickets"), "a ticket is left"


_KINDS = [
    "wide-64o-u8-p2-g1-s2-x1-y64",  # cut tiles
    "wide-32o-u8-p3-g1-s2-x1-y64",
    "wide-128o-u4-p2-g2-s1-x1-y64",
    "wide-64o-u8-p1-g2-s1-x1-y64-nopdl",
    "wide-96o-u4-p1-g1-s2-x1-y64",  # several pieces
    "wide-128t-u2-p1-g3-s1-x1-y128",  # three warpgroups in turn
    "wide-192s-u8-p1-g2-s1-x1-y192-late",
    "wide-256l-u4-p1-g2-s1-x1-y128",
    "swap-8-g1-k3-x2-s2",  # split K
    "swap-16-g2-k0-x1-s1",  # steps dealt
]


@pytest.mark.parametrize("text", _KINDS)
def test_everything_is_multiplied_and_stored_once(text: str) -> None:
    config = parse(text)
    for i, shape in enumerate(_few(config)):
        _check_launch(config, shape, early=i == 0, seed=i)


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text, _ in chosen()])
def test_so_it_is_with_every_configuration_that_may_be_chosen(text: str) -> None:
    config = parse(text)
    for i, shape in enumerate(_few(config)):
        _check_launch(config, shape, early=i == 1, seed=i)


@pytest.mark.slow
@pytest.mark.parametrize("text", _KINDS)
def test_so_it_is_with_few_rows_and_with_boxes_that_hold_no_rows(text: str) -> None:
    config = parse(text)
    for i, shape in enumerate(set(ragged_shapes(config)) - set(_few(config))):
        _check_launch(config, shape, early=i % 2 == 0, seed=i)


def test_a_wrong_number_of_bytes_is_a_deadlock() -> None:
    def edit(ptx: str) -> str:
        assert ", 8320;" in ptx  # 64 x 128 elements and a box of scales
        return ptx.replace(", 8320;", ", 8321;")

    run = Run(launch(parse("wide-64o-u8-p1-g2-s1-x1-y64"), 130, 576, 1024), edit)
    with pytest.raises(Deadlock, match="program .*: thread 0 at"):
        list(run.execute())
