"""Measured configurations, a table for each card: N x K -> M -> configuration.

Shipped ones lie beside this file, under the card's name ("nvidia-h200.json"). `blockscale tune` writes a user's own
into `user_folder()`; those come first.
"""

from __future__ import annotations

import json
import os
from functools import cache
from importlib import resources
from pathlib import Path

Table = dict[str, dict[str, str]]


def user_folder() -> Path:
    """Where `blockscale tune` keeps its tables: $BLOCKSCALE_TABLES, else blockscale/tables in the user's cache."""
    if said := os.environ.get("BLOCKSCALE_TABLES"):
        return Path(said)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockscale" / "tables"


def read(chip: str) -> Table:
    """The table of a card, the user's rows over the shipped ones; empty for a card that nobody measured."""
    return _read(chip)[0]


def origin(chip: str, shape: str, m: str) -> str:
    """The file that a row of `read(chip)` came from: a path, or "shipped/<card>.json"."""
    return _read(chip)[1][shape, m]


def forget() -> None:
    """Read the files again when they are next asked for."""
    _read.cache_clear()


@cache
def _read(chip: str) -> tuple[Table, dict[tuple[str, str], str]]:
    found: Table = {}
    origins: dict[tuple[str, str], str] = {}
    own = user_folder() / f"{chip}.json"
    for source, name in ((resources.files(__package__) / f"{chip}.json", f"shipped/{chip}.json"), (own, str(own))):
        if chip and source.is_file():
            for shape, rows in json.loads(source.read_text()).items():
                found.setdefault(shape, {}).update(rows)
                origins |= {(shape, m): name for m in rows}
    return found, origins


def write(chip: str, rows: Table) -> Path:
    """Add rows to the user's table of a card; returns its path."""
    path = user_folder() / f"{chip}.json"
    table: Table = json.loads(path.read_text()) if path.is_file() else {}
    for shape, found in rows.items():
        table.setdefault(shape, {}).update(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.replace(path)  # whole or not at all
    forget()
    return path
