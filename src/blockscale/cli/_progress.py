"""Progress of a long job: a bar for people, one JSON object a line for machines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..checkpoint.job import Event, Listener


@contextmanager
def listening(as_json: bool) -> Iterator[Listener]:
    """A listener for `run_job`. The bar goes to stderr, JSON lines to stdout; "advance" events only move the bar."""
    if not first_rank():
        yield lambda event: None
        return
    if as_json:
        yield _print_event
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
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
