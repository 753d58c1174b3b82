"""Measured tables: shipped ones, a user's own over them, whole files or none."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blockscale.cli import app
from blockscale.kernels.gluon import tables
from blockscale.kernels.gluon.config import parse
from blockscale.kernels.gluon.selection import by_rule, choose, entry, measured


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKSCALE_TABLES", str(tmp_path))
    tables.forget()
    choose.cache_clear()
    yield
    tables.forget()
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


def test_a_choice_says_which_row_of_which_file_it_is(tmp_path: Path) -> None:
    path = tables.write("a-card", {"64x128": {"16": "swap-16-g1-k1-x1-s1"}})
    assert entry(9, 64, 128, "a-card") == f"{path}, row 64x128, M=16"
    assert str(choose(9, 64, 128, 132, "a-card")) == "swap-16-g1-k1-x1-s1"
    assert entry(17, 64, 128, "a-card") == "rule"
    assert choose(17, 64, 128, 132, "a-card") == by_rule(17, 64, 128, 132)
    assert entry(1, 2112, 7168, "nvidia-h200") == "shipped/nvidia-h200.json, row 2112x7168, M=1"


def test_explain_shows_the_rows_that_it_used(tmp_path: Path) -> None:
    path = tables.write("a-card", {"64x128": {"16": "swap-16-g1-k1-x1-s1"}})
    platform = "cuda:sm_90+triton=3.6+sms=132+chip=a-card"
    result = CliRunner().invoke(app, ["explain", "--shape", "64,128", "--platform", platform, "--json"])
    said = {d["kernel"]: d["configurations"] for d in json.loads(result.stdout)["decisions"]}
    assert f"M=16: swap-16-g1-k1-x1-s1 ({path}, row 64x128, M=16)" in said["gluon.decode"]
    assert f"M=128: {by_rule(128, 64, 128, 132)} (rule)" in said["gluon.prefill"]
    assert said["reference.linear"] == []
