"""Ctrl-C while the command line still imports torch: exit code 130, one word, no traceback.

That takes a second or more, and `main`, which handles Ctrl-C afterwards, cannot be reached before it. The package
imports this module first. A program that imports the package keeps its own ways: only `blockscale …` and
`python -m blockscale …` are meant.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType


def _is_command() -> bool:
    """Whether this process was started as our command: by the words before its arguments.

    `sys.argv` is ["-m", arguments …] while Python imports the package of `python -m`, [script, arguments …] in the
    installed script, and in a worker of multiprocessing that of its parent.
    """
    words = sys.orig_argv[-len(sys.argv) :]
    return bool(words) and Path(words[0]).name == "blockscale"


def _leave(number: int, frame: FrameType | None) -> None:
    """Without KeyboardInterrupt, which whoever is being imported could catch. One rank speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"interrupted\n")
    os._exit(130)


def restore() -> None:
    """From here on Ctrl-C is KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    _is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a job in the background ignores it
):
    signal.signal(signal.SIGINT, _leave)
