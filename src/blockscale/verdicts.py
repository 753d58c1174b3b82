"""Verdicts of the self-test, kept between processes: one small JSON file for each machine, driver and set of versions.

A file maps `<op>.<kernel>.<format>` to "passed" or "failed: why". It lies under $BLOCKSCALE_CACHE, else
$XDG_CACHE_HOME/blockscale, else ~/.cache/blockscale; deleting it only means that kernels are tried again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .errors import BlockscaleError

SWITCH = "BLOCKSCALE_SELF_TEST"
"""1: try kernels on their first use. 0: neither try nor believe what was recorded. Unset: believe, do not try."""
PASSED = "passed"


def switch() -> str:
    """The variable's value: "1", "0" or "" (unset). Raises BlockscaleError for any other."""
    value = os.environ.get(SWITCH, "")
    if value not in ("", "0", "1"):
        raise BlockscaleError(f"{SWITCH}: needs 0 or 1, got {value!r}")
    return value


def folder() -> Path:
    """Where the files lie."""
    base = os.environ.get("BLOCKSCALE_CACHE")
    if base:
        return Path(base) / "self-test"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockscale" / "self-test"


def key(facts: Iterable[str]) -> str:
    """A file name for everything that could change a verdict."""
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def read(key: str) -> dict[str, str]:
    """Every verdict under this key; none when there is no file or it is damaged."""
    if switch() == "0":
        return {}
    try:
        found = json.loads((folder() / f"{key}.json").read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def record(key: str, name: str, verdict: str) -> None:
    """Add one verdict. The file is replaced in one step; of two processes that write at once the last one wins, and
    what the other found is found again."""
    path = folder() / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BlockscaleError(f"self-test: needs a folder for verdicts (BLOCKSCALE_CACHE): {e}") from e
    text = json.dumps({**read(key), name: verdict}, indent=1, sort_keys=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{key}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def failures(key: str) -> list[tuple[str, str]]:
    """Failed verdicts as features of a `Platform`: ("self-test.<op>.<kernel>.<format>", "failed: why")."""
    return [(feature(name), verdict) for name, verdict in read(key).items() if verdict != PASSED]


def feature(name: str) -> str:
    return f"self-test.{name}"
