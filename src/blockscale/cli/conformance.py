"""`blockscale conformance`: hold every accepting kernel to the definition."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import conformance
from ..conformance.html import page
from ._output import check_target, print_json


def register(app: typer.Typer) -> None:
    @app.command("conformance")
    def command(
        device: Annotated[str, typer.Option(help="Device to run on: cpu, cuda, cuda:1, xpu …")] = "cpu",
        kernel: Annotated[str | None, typer.Option(help="Only this kernel or family.")] = None,
        quick: Annotated[bool, typer.Option("--quick", help="One small case of each kind.")] = False,
        workers: Annotated[int, typer.Option(help="Processes that share the cases; 0 runs them here.", min=0)] = 0,
        seconds: Annotated[float | None, typer.Option(help="Start no case after that many seconds.", min=0)] = None,
        html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML file.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Run every accepting kernel against the reference: formats, ragged shapes, edge values. Exit 1 on a fault."""
        if html is not None:
            check_target("--html", html)
        report = conformance.run(device, kernel=kernel, quick=quick, workers=workers, seconds=seconds)
        if html is not None:
            html.write_text(page(report), encoding="utf-8")
        if as_json:
            print_json(report.to_json())
        else:
            print(report.text())
        if not report.green:
            raise typer.Exit(1)
