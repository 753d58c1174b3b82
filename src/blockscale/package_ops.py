"""Torch ops that other packages bring: the schemas on record, and those that are registered here."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def _records() -> tuple[dict[str, Any], ...]:
    """What we know of packages that bring torch ops: {package, version, import: modules, schemas: {op: schema}}."""
    return tuple(json.loads(path.read_text()) for path in sorted(Path(__file__).parent.glob("kernels/*/schemas.json")))


def recorded(version_of: Callable[[str], str | None]) -> list[tuple[str, str]]:
    """(op, schema) of the described packages: "0.1.16" and no version at all mean the version on record, "0.1.9" is
    unknown. version_of: a package's version, "" for none, None where the package is not there."""
    found: list[tuple[str, str]] = []
    for record in _records():
        version = version_of(record["package"])
        if version is not None and f"{record['version']}.".startswith(f"{version}." if version else ""):
            found += record["schemas"].items()
    return found


def recorded_schema(op: str) -> str | None:
    """The schema that our adapters know of a package's torch op, None for an op that is not on record."""
    return next((r["schemas"][op] for r in _records() if op in r["schemas"]), None)


def installed() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(what went wrong, ops that are there) of packages that register torch ops when they are imported."""
    errors, ops = [], []
    for record in _records():
        try:
            for module in record["import"]:
                importlib.import_module(module)
        except Exception as e:  # built for another torch, a library is missing, half an installation
            roots = {module.partition(".")[0] for module in record["import"]}
            if isinstance(e, ModuleNotFoundError) and e.name in roots:
                continue  # the package is not here at all: kernels that want its ops say so
            errors.append((f"{record['package']}.error", f"{e} ".splitlines()[0].replace("+", " plus ").strip()))
        for op in record["schemas"]:
            ops += [(op, schema_text(s)) for s in torch._C._jit_get_schemas_for_operator(op)]
    return errors, ops


def schema_text(schema: Any) -> str:
    """A registered schema as people write it: torch prints unnamed aliases as `Tensor($0! -> )`, unreadably."""
    return re.sub(r"\(\$\d+(!?) -> \)", r"\1", str(schema))
