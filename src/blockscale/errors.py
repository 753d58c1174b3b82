"""What can go wrong, as types. Every message says what was got, what is needed, and where."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BlockscaleError(Exception):
    """Base of everything this library raises on purpose."""


class ShapeError(BlockscaleError, ValueError):
    """A tensor or a scale grid has the wrong shape."""


class DtypeError(BlockscaleError, TypeError):
    """A dtype that the format, layout or operation does not have."""


class ScaleError(BlockscaleError, ValueError):
    """A scale that cannot multiply: NaN, infinite, negative, or not storable as asked."""


class UnknownNameError(BlockscaleError, LookupError):
    """A format, layout, kernel, platform or policy name that does not exist."""

    def __init__(self, what: str, got: str, known: Iterable[str], where: str = "") -> None:
        known = list(known)
        near = difflib.get_close_matches(got, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(sorted(known))}"
        super().__init__(f"unknown {what} {got!r}; {hint}" + (f" ({where})" if where else ""))


class NoKernelError(BlockscaleError, LookupError):
    """No kernel accepts the problem, or the one that was ordered refuses it."""


class CheckpointError(BlockscaleError, ValueError):
    """A checkpoint on disk that is damaged, incomplete or contradicts itself."""
