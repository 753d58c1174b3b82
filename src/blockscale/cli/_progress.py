"""Progress of a long job: a bar for people, one JSON object a line for machines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..checkpoint.job import Event, Listener
from ..errors import BlockscaleError


@contextmanager
def listening(as_json: bool) -> Iterator[Listener]:
    """A listener for a job. The bar goes to stderr, JSON lines to stdout; "advance" events only move the bar.

    With JSON, a run that fails ends with a line {"event": "error", "message": …}, besides the one on stderr.
    """
    try:
        if not first_rank():
            yield lambda event: None
        elif as_json:
            yield _print_event
        else:
            with _bar() as show:
                yield show
    except (BlockscaleError, OSError) as e:
        if as_json and first_rank():
            _print_event({"event": "error", "message": str(e)})
        raise
    except KeyboardInterrupt:
        if first_rank():
            print("interrupted; the same command goes on from here", file=sys.stderr)
        raise


@contextmanager
def _bar() -> Iterator[Listener]:
    """Only on a terminal: a log file wants no bars."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None)

        def show(event: Event) -> None:
            if event["event"] == "start":
                progress.update(task, total=event["bytes"])
            elif event["event"] == "advance":
                progress.update(task, advance=event["bytes"], description=_shortened(event["name"]))

        yield show


def first_rank() -> bool:
    """Whether this process speaks for the run: under torchrun only one does."""
    return os.environ.get("RANK", "0") == "0"


def _print_event(event: Event) -> None:
    if event["event"] != "advance":
        print(json.dumps(event), flush=True)


def _shortened(name: str) -> str:
    return name if len(name) <= 48 else "…" + name[-47:]
