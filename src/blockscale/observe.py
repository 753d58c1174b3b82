"""See what runs: a log of decisions, a counter for each kernel, ranges in profiles.

BLOCKSCALE_LOG=decisions prints each kernel choice once, when it is made. `calls` counts the calls of each kernel in
this process. Under torch.profiler or NVTX every call shows as `blockscale.<op>[<shape>] <kernel>`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from contextlib import AbstractContextManager, suppress

import torch
from torch.autograd import profiler

from .errors import UnknownNameError

LOG = "BLOCKSCALE_LOG"
_TOPICS = ("decisions",)

logger = logging.getLogger("blockscale")
logger.addHandler(logging.NullHandler())

calls: Counter[str] = Counter()
"""Calls of each kernel since the process started, or since `calls.clear()`."""


def configure(text: str | None = None) -> None:
    """Follow BLOCKSCALE_LOG (or the given text): comma-separated topics, of which "decisions" is the only one.

    Raises UnknownNameError for another topic.
    """
    topics = [t for t in (os.environ.get(LOG, "") if text is None else text).split(",") if t]
    for topic in topics:
        if topic not in _TOPICS:
            raise UnknownNameError("log topic", topic, _TOPICS, where=LOG)
    if "decisions" in topics and not any(isinstance(h, _Stderr) for h in logger.handlers):
        logger.addHandler(_Stderr())
        logger.setLevel(logging.INFO)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever stderr is at the moment, so that captured streams are respected."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("blockscale: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def watched() -> bool:
    """Whether a profiler is watching: a range costs microseconds, so there is one only for it."""
    return bool(profiler._is_profiler_enabled)


def span(op: str, m: int, n: int, k: int, kernel: str) -> AbstractContextManager[object]:
    """A named range in the profile."""
    return torch.profiler.record_function(f"blockscale.{op}[{m}x{n}x{k}] {kernel}")


# Known topics are followed from the start. An unknown one must not keep the package from being imported: the first
# choice of a kernel raises it (`registry`), and the command line before all else.
with suppress(UnknownNameError):
    configure()
