"""Workers that hang or die cost one configuration, not the rest."""

import sys

import pytest

from blockscale.kernels.gluon import workers
from blockscale.kernels.gluon.config import Swap, Wide
from blockscale.kernels.gluon.selection import misfit
from blockscale.kernels.gluon.workers import check_all, ragged_shapes

FAKE = """
import json, sys, time
for text in sys.argv[1].split(","):
    if text == "hangs":
        time.sleep(60)
    if text == "dies":
        sys.exit(3)
    print("CHECK", json.dumps([text, "wrong rows" if text == "wrong" else ""]), flush=True)
"""


def test_one_bad_configuration_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_START_SECONDS", 1.0)
    monkeypatch.setattr(workers, "_SILENT_SECONDS", 1.0)
    texts = ["a", "b", "hangs", "c", "d", "dies", "wrong", "e"]
    found = check_all(texts, seconds=30, workers=2, command=[sys.executable, "-c", FAKE])
    assert found.pop("dies").startswith("worker ended with 3")
    assert found == {"a": "", "b": "", "c": "", "d": "", "e": "", "wrong": "wrong rows", "hangs": "hung"}


def test_what_is_not_reached_in_time_says_so() -> None:
    found = check_all(["a", "hangs", "b"], seconds=1, workers=1, command=[sys.executable, "-c", FAKE])
    assert found == {"a": "", "hangs": "not reached", "b": "not reached"}


@pytest.mark.parametrize("config", [Wide(128, 8), Wide(64, 8, step=4), Swap(16, split=4, step=2), Swap(8, split=8)])
def test_every_configuration_is_checked_on_ragged_columns(config: Wide | Swap) -> None:
    shapes = list(ragged_shapes(config))
    assert all(misfit(config, k) == "" for _, _, k in shapes)
    assert any(n % 128 for _, n, _ in shapes)
