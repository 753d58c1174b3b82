"""`blockscale inspect`: what a checkpoint holds, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..checkpoint import open_checkpoint
from ..checkpoint.summary import summarize
from ._output import console, print_json


def register(app: typer.Typer) -> None:
    @app.command("inspect")
    def command(
        checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or safetensors file.")],
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Formats, scale dtypes, ragged shapes and sizes. Reads headers only; exit 2 when something does not fit."""
        summary = summarize(open_checkpoint(checkpoint))
        if as_json:
            print_json(summary)
        else:
            _show(summary)


def _show(summary: dict[str, Any]) -> None:
    out = console()
    model = summary["model_type"] or "unknown model"
    out.print(f"{summary['path']}: {model}, {summary['quantization'] or 'not quantized'}", highlight=False)
    out.print(f"{summary['tensors']} tensors, {summary['files']} files, {_size(summary['bytes'])}", highlight=False)
    if summary["layers"]:
        bits = summary["bits_per_weight"]
        scaled = f"{summary['layers']} block-scaled weights, {_size(summary['layer_bytes'])}"
        out.print(f"{scaled}, {bits:.3f} bits per weight", highlight=False)
        table = Table("format", "scale", "shape", "layers", "ragged", "for example")
        for row in summary["shapes"]:
            shape = " x ".join(map(str, row["shape"]))
            ragged = "ragged" if row["ragged"] else ""
            table.add_row(row["format"], row["scale_dtype"], shape, str(row["layers"]), ragged, row["example"])
        out.print(table)
        out.print(_ranks_table(summary["tensor_parallel"]))
    plain = Table("unquantized", "tensors", "bytes")
    for dtype, row in summary["plain"].items():
        plain.add_row(dtype, str(row["tensors"]), _size(row["bytes"]))
    out.print(plain)


def _ranks_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("ranks", "tensor parallel", "whole", "aligned", "cut inside a block", "uneven", "for example")
    for row in rows[1:]:
        example = next(iter(row["examples"].values()), "")
        counts = [str(row[kind]) for kind in ("whole", "aligned", "inside", "uneven")]
        table.add_row(str(row["ranks"]), row["verdict"], *counts, example)
    return table


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
