"""`blockscale doctor`: what this machine is, and each kernel run once before it is called usable."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..conformance import cases, check
from ..platform import detect
from ..registry import explain
from ._output import console, print_json


def register(app: typer.Typer) -> None:
    @app.command("doctor")
    def command(
        device: Annotated[str, typer.Option(help="Device to examine: cpu, cuda, xpu …")] = "cpu",
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Detect the platform and run every accepting kernel on a tiny problem."""
        report = examine(device)
        if as_json:
            print_json(report)
        else:
            _show(report)


def examine(device: str) -> dict[str, Any]:
    """`{platform, features, kernels: [{op, kernel, accepted, ran, max_error, reasons}]}`.

    max_error: worst error over its bound, None when the kernel did not run. A kernel that raises or fails is listed
    with that as its reason, so a broken driver or package never ends the report.
    """
    platform = detect(device)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases(quick=True):
        for decision in explain(case.problem(), platform):
            kernel = decision.kernel
            key = (kernel.op, kernel.name)
            row = rows.setdefault(
                key,
                {
                    "op": kernel.op,
                    "kernel": kernel.name,
                    "accepted": False,
                    "ran": False,
                    "max_error": None,
                    "reasons": [],
                },
            )
            row["accepted"] |= decision.accepted
            row["reasons"] += [r for r in decision.reasons if r not in row["reasons"]]
            if decision.accepted:
                failure, error = check(kernel, case, device)
                row["ran"] |= failure is None
                row["max_error"] = max(error, row["max_error"] or 0.0) if error != float("inf") else row["max_error"]
                if failure:
                    row["reasons"].append(f"ran wrong: {failure.case}: got {failure.got}, want {failure.want}")
    return {"platform": str(platform), "features": dict(platform.features), "kernels": list(rows.values())}


def _show(report: dict[str, Any]) -> None:
    out = console()
    out.print(f"platform  {report['platform']}", highlight=False)
    table = Table("op", "kernel", "state", "error / bound")
    for row in report["kernels"]:
        if row["accepted"]:
            error = "" if row["max_error"] is None else f"{row['max_error']:.2g}"
            table.add_row(row["op"], row["kernel"], "runs" if row["ran"] else "[red]BROKEN[/red]", error)
    out.print(table)
    for row in report["kernels"]:
        if row["accepted"] and not row["ran"]:
            out.print(
                f"[red]BROKEN[/red] {row['op']} {row['kernel']}: {escape('; '.join(row['reasons']))}", highlight=False
            )
    out.print("does not serve this device (every reason: --json, or blockscale explain)")
    refusing = {row["kernel"]: row for row in report["kernels"] if not row["accepted"]}
    usable = {row["kernel"] for row in report["kernels"] if row["accepted"]}
    for name, row in refusing.items():
        if name not in usable:
            out.print(f"  {name}: {escape(row['reasons'][0])}", highlight=False)
