"""What the checkpoint tools refuse. All are CheckpointErrors, so commands exit with 2."""

from __future__ import annotations

from ..errors import CheckpointError


class DestinationError(CheckpointError):
    """The destination exists and is not an earlier run of the same request."""


class NotFiniteError(CheckpointError):
    """A weight holds NaN or infinities."""


class InexactError(CheckpointError):
    """A conversion that would change values, and was not allowed to."""
