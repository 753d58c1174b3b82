"""What commands share: tables for people, JSON for machines."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import BlockscaleError
from ..platform import Platform, detect
from ..registry import Decision, Plan, Problem

WIDTH = 200
"""Columns of a table that goes to no terminal: names in a log or an issue shall be whole."""


def console() -> Console:
    """stdout, made when it is used, so that a captured or redirected stream is respected."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(soft_wrap=True, width=None if known else WIDTH)


def print_json(value: Any) -> None:
    """One JSON document on stdout; infinities and NaN, for which JSON has no words, are null."""
    print(json.dumps(_sayable(value), indent=2, allow_nan=False))


def _sayable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sayable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sayable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def platform_from(text: str | None, device: str) -> Platform:
    """The platform that the user described, or the device's own."""
    return Platform.parse(text) if text else detect(device)


def check_target(option: str, path: Path) -> None:
    """Before the work whose result the file shall hold: raises BlockscaleError where it cannot be written."""
    if path.is_dir() or not path.parent.is_dir():
        got = f"{path}, which is a folder" if path.is_dir() else f"{path}: there is no folder {path.parent}"
        raise BlockscaleError(f"{option}: needs a file in a folder that is there, got {got}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BlockscaleError(f"{option}: may not write {path}")


def plan_json(plan: Plan | None) -> list[dict[str, Any]]:
    return [{"m_min": s.m_min, "m_max": s.m_max, "kernel": s.kernel.name} for s in plan.spans] if plan else []


def configurations(decision: Decision, problem: Problem, platform: Platform) -> list[str]:
    """What an accepting kernel would launch by M, and where that choice comes from; of kernels that say so."""
    said = getattr(decision.kernel, "configurations", None)
    return list(said(problem, platform)) if said and decision.accepted else []


def decisions_json(decisions: list[Decision], problem: Problem, platform: Platform) -> list[dict[str, Any]]:
    return [
        {"kernel": d.kernel.name, "accepted": d.accepted, "reasons": list(d.reasons), "notes": list(d.notes),
         "configurations": configurations(d, problem, platform)}
        for d in decisions
    ]  # fmt: skip


def problem_json(problem: Problem) -> dict[str, Any]:
    return {
        "op": problem.op,
        "n": problem.n,
        "k": problem.k,
        "x_dtype": str(problem.x_dtype).removeprefix("torch."),
        "format": str(problem.format) if problem.format else None,
        "activation_format": str(problem.activation_format) if problem.activation_format else None,
        "numerics": str(problem.numerics),
        "groups": problem.groups or None,
    }
