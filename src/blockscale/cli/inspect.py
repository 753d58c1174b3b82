"""`blockscale inspect`: what a checkpoint holds, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..checkpoint import open_checkpoint
from ..checkpoint.sharding import splits
from ..checkpoint.summary import summarize
from ..errors import BlockscaleError
from ._output import console, print_json


def register(app: typer.Typer) -> None:
    @app.command("inspect")
    def command(
        checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or safetensors file.")],
        ranks: Annotated[
            int | None, typer.Option(help="Show how every kind of layer splits over so many tensor-parallel ranks.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Formats, scale dtypes, ragged shapes, sizes, and the fit for tensor parallelism. Reads headers only.

        Exit codes: 0; 2 when something in the checkpoint does not fit together.
        """
        if ranks is not None and ranks < 1:
            raise BlockscaleError(f"inspect: --ranks needs at least 1, got {ranks}")
        found = open_checkpoint(checkpoint)
        summary = summarize(found)
        if ranks is not None:
            summary["splits"] = splits(found.layers, ranks)
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
        if "splits" in summary:
            out.print(_splits_table(summary["splits"]))
    plain = Table("unquantized", "tensors", "bytes")
    for dtype, row in summary["plain"].items():
        plain.add_row(dtype, str(row["tensors"]), _size(row["bytes"]))
    out.print(plain)


def _ranks_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("ranks", "tensor parallel", "whole", "aligned", "cut inside a block", "uneven", "which")
    for row in rows[1:]:
        kinds = [kind for found in row["kinds"].values() for kind in found]
        which = (kinds[0] + (f" and {len(kinds) - 1} more" if len(kinds) > 1 else "")) if kinds else ""
        counts = [str(row[kind]) for kind in ("whole", "aligned", "inside", "uneven")]
        table.add_row(str(row["ranks"]), row["verdict"], *counts, which)
    return table


def _splits_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("kind", "format", "shape", "layers", "cut", "each rank", "block", "fit")
    for row in rows:
        shape, share = " x ".join(map(str, row["shape"])), "" if row["share"] is None else str(row["share"])
        counts = (shape, str(row["layers"]), row["cut"] or "", share, str(row["block"]))
        table.add_row(row["kind"], row["format"], *counts, row["fit"])
    return table


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
