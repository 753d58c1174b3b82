"""`blockscale verify`: compare two checkpoints, tensor by tensor and, if asked, by what the models say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..checkpoint import compare_checkpoints
from ..errors import BlockscaleError
from ._logits import compare_logits
from ._output import console, print_json

_SHOWN = 20
"""Rows of a table for people."""


def register(app: typer.Typer) -> None:
    @app.command("verify")
    def command(
        a: Annotated[Path, typer.Argument(help="The checkpoint that errors are relative to.")],
        b: Annotated[Path, typer.Argument(help="The other one.")],
        max_error: Annotated[
            float | None,
            typer.Option(min=0, help="Accept weights up to this relative error; else only equal values."),
        ] = None,
        logits: Annotated[bool, typer.Option("--logits", help="Run both models on --text too.")] = False,
        text: Annotated[Path | None, typer.Option(help="Text file for --logits.")] = None,
        tokens: Annotated[int, typer.Option(min=2, help="Tokens that a model sees at once, for --logits.")] = 512,
        chunks: Annotated[int, typer.Option(min=1, help="How many such pieces of the text, for --logits.")] = 4,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Structure, bytes, the values of each weight and the quantization configs; nothing is held whole in memory.

        Exit codes: 0 the same (or within --max-error); 1 different; 2 a damaged checkpoint.
        """
        if logits and text is None:
            raise BlockscaleError("verify: --logits needs --text FILE")
        said = _read(text) if logits and text is not None else None
        report = compare_checkpoints(a, b)
        report["allowed_error"] = max_error or 0.0
        report["passed"] = not report["structure"] and report["max_relative_error"] <= report["allowed_error"]
        if said is not None:
            report["logits"] = compare_logits(a, b, said, tokens, chunks)
        if as_json:
            print_json(report)
        else:
            _show(report)
        if not report["passed"]:
            raise typer.Exit(1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise BlockscaleError(f"{path}: needs text in UTF-8: {e}") from e


def _show(report: dict[str, Any]) -> None:
    out = console()
    for line in report["structure"][:_SHOWN]:
        out.print(line, style="red", highlight=False)
    if len(report["structure"]) > _SHOWN:
        out.print(f"… and {len(report['structure']) - _SHOWN} more", style="red", highlight=False)
    for key, one, two in report["config"]:
        out.print(f"{key}: {one} against {two}", highlight=False)
    unequal = [r for r in report["tensors"] if not r["equal_bytes"]]
    different = sorted((r for r in unequal if r["relative_error"]), key=lambda r: -float(r["relative_error"]))
    if different:
        table = Table(Column("tensor", overflow="fold"), "a", "b", "relative error", "largest error")
        for row in different[:_SHOWN]:
            error, worst = f"{row['relative_error']:.3g}", f"{row['max_error']:.3g}"
            table.add_row(row["name"], row["a"], row["b"], error, worst)
        out.print(table)
    if len(different) > _SHOWN:
        out.print(f"… and {len(different) - _SHOWN} more; --json has all", highlight=False)
    equal, same = len(report["tensors"]) - len(unequal), len(unequal) - len(different)
    counts = f"{equal} tensors equal in bytes, {same} in values only, {len(different)} different"
    out.print(counts, highlight=False)
    for name, value in report.get("logits", {}).items():
        out.print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}", highlight=False)
    words = "identical" if report["identical"] else "same values" if report["same_values"] else "different values"
    out.print(f"{words}; {'passed' if report['passed'] else 'FAILED'}", highlight=False)
