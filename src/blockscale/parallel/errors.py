"""What can go wrong when work is spread over ranks."""

from __future__ import annotations

from ..errors import BlockscaleError


class PlanError(BlockscaleError, ValueError):
    """A checkpoint that cannot be spread over that many ranks: which layer, and why."""


class RankError(BlockscaleError, RuntimeError):
    """Another rank failed, or did not answer in time."""
