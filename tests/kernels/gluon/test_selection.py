"""Which configuration a shape gets, as literal tables. Pure: no GPU, no triton."""

from pathlib import Path

import pytest
import torch

from blockscale.formats import get_format
from blockscale.kernels.gluon import heuristic, tables
from blockscale.kernels.gluon.candidates import candidates, ranked
from blockscale.kernels.gluon.config import Swap, parse
from blockscale.kernels.gluon.selection import by_rule, choose, measured, misfit
from blockscale.ops import linear_problem
from blockscale.reference import quantize


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (1, 2048, 5120, "swap-8-g1-k3-x1-s2"),  # 32 tiles, three programs each; SMs are left to the next
        (8, 5120, 3072, "swap-8-g1-k3-x2-s2"),  # 240 programs, two an SM
        (16, 3584, 4608, "wide-32o-u8-p1-g1-s2-x1-y64"),  # 112 tiles
        (16, 18432, 7168, "wide-160o-u4-p1-g1-s2-x1-y64"),  # 116 tiles
        (32, 5120, 3072, "wide-64o-u8-p1-g1-s2-x1-y64"),
        (64, 24576, 1536, "wide-64o-u6-p1-g1-s2-x1-y64"),
        (128, 512, 7168, "wide-32o-u8-p4-g1-s2-x1-y64"),  # 32 tiles, four programs each
        (128, 5120, 3072, "wide-128o-u8-p1-g1-s1-x1-y64-late"),  # 80 tiles: an early start, but no early weights
        (512, 1536, 7168, "wide-128o-u8-p1-g1-s1-x1-y64-nopdl"),  # 96 tiles and a long K: no early start
        (256, 2048, 5120, "wide-64o-u8-p1-g1-s2-x1-y64-nopdl"),  # 128 tiles and a long K: no early start
        (512, 2560, 8192, "wide-128o-u8-p1-g2-s1-x1-y128-late"),
        (512, 5120, 3072, "wide-192s-u8-p1-g2-s1-x1-y192-late"),  # 108 tiles
        (512, 4096, 7168, "wide-128o-u8-p1-g2-s1-x1-y128-nopdl"),
        (512, 18432, 7168, "wide-192s-u8-p1-g2-s1-x1-y192-nopdl"),  # three waves
        (4096, 4096, 7168, "wide-256l-u4-p1-g2-s1-x1-y128-late"),
        (4096, 7168, 2048, "wide-256l-u4-p1-g2-s1-x1-y128-late"),
        (4096, 32768, 512, "wide-256l-u1-p1-g2-s1-x1-y128-t32"),
        (4096, 2112, 7168, "wide-128t-u2-p1-g3-s1-x1-y128"),  # 22 x 17 tiles: three waves, 94 % full
        (512, 4096, 512, "wide-128o-u4-p1-g2-s1-x1-y128"),
    ],
)
def test_rule(m: int, n: int, k: int, config: str) -> None:
    assert str(by_rule(m, n, k, 132)) == config


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (2048, 7168, 9216, "wide-128o-u8-p1-g2-s1-x1-y64-nopdl"),  # with two bytes it stages 128 columns
        (2048, 7168, 2048, "wide-128o-u8-p1-g2-s1-x1-y64-nopdl"),
        (4096, 7168, 8192, "wide-256l-u4-p1-g2-s1-x1-y64-late"),
        (4096, 7168, 1024, "wide-256l-u1-p1-g2-s1-x1-y64-t32"),
        (16, 7168, 9216, "wide-64o-u8-p1-g1-s2-x1-y64"),
    ],
)
def test_fp32_results_take_more_memory_to_stage(m: int, n: int, k: int, config: str) -> None:
    assert str(by_rule(m, n, k, 132, out_bytes=4)) == config


def test_the_table_of_two_byte_results_is_not_asked_about_large_tiles_of_fp32() -> None:
    assert measured(2048, 7168, 2048, H100, out_bytes=2) == parse(tables.read(H100)["7168x2048"]["2048"])
    assert measured(2048, 7168, 2048, H100, out_bytes=4) is None
    assert measured(16, 7168, 2048, H100, out_bytes=4) == parse(tables.read(H100)["7168x2048"]["16"])


H200, H100 = "nvidia-h200", "nvidia-h100-80gb-hbm3"
TABLES = sorted(p.stem for p in Path(tables.__file__).parent.glob("*.json"))


@pytest.mark.parametrize("chip", TABLES)
def test_every_row_of_a_shipped_table_reads(chip: str) -> None:
    for shape, rows in tables.read(chip).items():
        n, k = map(int, shape.split("x"))
        for m, text in rows.items():
            config = parse(text)
            assert not misfit(config, k), (n, k, m, text)
            if isinstance(config, Swap):
                assert int(m) <= 64
                assert config.stages % config.groups == 0  # a stage is always the same warpgroup's


@pytest.mark.parametrize(
    ("text", "k", "why"),
    [
        ("swap-16-g1-k6-x2-s2", 512, "K=512 has 2 steps, swap-16-g1-k6-x2-s2 needs 6 or more, one for each part of K"),
        ("swap-8-g1-k2-x1-s2", 640, "K=640 has 5 k-blocks, swap-8-g1-k2-x1-s2 needs a multiple of 2"),
        ("wide-64o-u8-p1-g1-s4-x1-y64", 720, "K=720 has 6 k-blocks, wide-64o-u8-p1-g1-s4-x1-y64 needs a multiple of 4"),
        ("swap-16-g1-k6-x2-s2", 1536, ""),
        ("swap-8-g1-k0-x1-s1", 128, ""),
    ],
)
def test_a_configuration_says_which_k_it_cannot_walk_through(text: str, k: int, why: str) -> None:
    assert misfit(parse(text), k) == why


@pytest.mark.parametrize("k", [16, 128, 256, 384, 512, 576, 640, 720, 1024, 1152, 1536, 2304, 7168])
def test_neither_the_rule_nor_tuning_gives_what_does_not_fit_k(k: int) -> None:
    for n in (64, 192, 1024, 2112, 7168, 24576):
        for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512, 2048):
            for sms in (114, 132):
                given = [by_rule(m, n, k, sms), *ranked(m, n, k, sms), *candidates(m, n, k, sms)]
                assert not [why for config in given if (why := misfit(config, k))], (m, n, k)


def test_the_table_answers_for_rows_that_are_tiled_alike() -> None:
    assert measured(1, 2112, 7168, H200) == parse(tables.read(H200)["2112x7168"]["1"])
    assert measured(12, 2112, 7168, H200) == parse(tables.read(H200)["2112x7168"]["16"])
    assert measured(100, 2112, 7168, H100) == parse(tables.read(H100)["2112x7168"]["128"])
    assert measured(129, 2112, 7168, H100) is None  # two rows of tiles; the next entry has four
    assert measured(16384, 2112, 7168, H100) is None
    assert measured(16, 2112, 7168, "nvidia-h100-nvl") is None  # another card
    assert measured(16, 2112, 7040, H200) is None


def test_without_the_table_the_rule_decides() -> None:
    assert choose(16, 2112, 7168, 114) == by_rule(16, 2112, 7168, 114)


def test_heuristic_is_a_function_of_the_problem() -> None:
    w = quantize(torch.zeros(256, 256), get_format("fp8_128x128"))
    assert str(heuristic(linear_problem(w, torch.bfloat16), 1, 132)) == "wide-16o-u8-p1-g1-s2-x1-y64"
