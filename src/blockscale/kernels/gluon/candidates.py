"""Configurations that are worth measuring for a shape. Pure."""

from __future__ import annotations

from .config import Config


def candidates(m: int, n: int, k: int, sm_count: int) -> list[Config]:
    return []
