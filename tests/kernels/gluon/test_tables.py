"""Measured tables: shipped ones, a user's own over them, whole files or none."""

import json
from pathlib import Path

import pytest

from blockscale.kernels.gluon import tables
from blockscale.kernels.gluon.config import parse
from blockscale.kernels.gluon.selection import choose, measured


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKSCALE_TABLES", str(tmp_path))
    tables.read.cache_clear()
    choose.cache_clear()
    yield
    tables.read.cache_clear()
    choose.cache_clear()


def test_a_card_that_nobody_measured_has_no_table() -> None:
    assert tables.read("nvidia-h800") == {}
    assert measured(16, 2112, 7168, "nvidia-h800") is None


def test_a_users_rows_come_before_the_shipped_ones(tmp_path: Path) -> None:
    shipped = tables.read("nvidia-h200")["2112x7168"]
    path = tables.write(
        "nvidia-h200", {"2112x7168": {"1": "swap-8-g1-k2-x1-s1"}, "64x128": {"7": "swap-8-g1-k1-x1-s1"}}
    )
    assert path == tmp_path / "nvidia-h200.json"
    mixed = tables.read("nvidia-h200")
    assert mixed["2112x7168"]["1"] == "swap-8-g1-k2-x1-s1"
    assert mixed["2112x7168"]["8"] == shipped["8"]
    assert measured(1, 2112, 7168, "nvidia-h200") == parse("swap-8-g1-k2-x1-s1")


def test_a_second_tuning_adds_to_the_first(tmp_path: Path) -> None:
    tables.write("a-card", {"64x128": {"1": "x", "8": "y"}})
    tables.write("a-card", {"64x128": {"8": "z"}, "128x128": {"1": "w"}})
    assert json.loads((tmp_path / "a-card.json").read_text()) == {"64x128": {"1": "x", "8": "z"}, "128x128": {"1": "w"}}
    assert [p.name for p in tmp_path.iterdir()] == ["a-card.json"]  # no half-written file is left


def test_the_users_cache_is_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BLOCKSCALE_TABLES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tables.user_folder() == tmp_path / "cache" / "blockscale" / "tables"
