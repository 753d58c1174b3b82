"""`blockscale conformance`: hold every accepting kernel to the definition."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from .. import conformance
from ._output import console, print_json


def register(app: typer.Typer) -> None:
    @app.command("conformance")
    def command(
        device: Annotated[str, typer.Option(help="Device to run on: cpu, cuda, cuda:1, xpu …")] = "cpu",
        kernel: Annotated[str | None, typer.Option(help="Only this kernel or family.")] = None,
        quick: Annotated[bool, typer.Option("--quick", help="One small case of each kind.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Run every accepting kernel against the reference: formats, ragged shapes, edge values. Exit 1 on a fault."""
        report = conformance.run(device, kernel=kernel, quick=quick)
        if as_json:
            print_json(report.to_json())
        else:
            _show(report)
        if report.failed or not report.cases:
            raise typer.Exit(1)


def _show(report: conformance.Report) -> None:
    out = console()
    out.print(f"platform  {report.platform}", highlight=False)
    table = Table("kernel", "cases", "failed", "worst error / bound")
    for name, count in report.kernels.items():
        failed = sum(f.kernel == name for f in report.failures)
        table.add_row(name, str(count), str(failed), f"{report.max_error[name]:.3g}")
    out.print(table)
    for failure in report.failures[:20]:
        out.print(f"FAIL {failure.kernel}: {failure.case}", style="red", highlight=False)
        out.print(f"     at {failure.coordinate}: got {failure.got}, want {failure.want}", highlight=False)
    if report.failed > 20:
        out.print(f"     … and {report.failed - 20} more (--json has all)")
    if not report.cases:
        out.print("no kernel accepted any case", style="red")
    out.print(f"{report.passed} passed, {report.failed} failed", highlight=False)
