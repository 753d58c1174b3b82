"""`blockscale inspect`: what a checkpoint holds, from its headers."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..checkpoint import open_checkpoint
from ..checkpoint.summary import summarize
from ..parallel.planner import plan_sharding
from ..parallel.summary import summarize as summarize_plan
from ..policy import model_policy
from ._fit import verdicts
from ._output import console, print_json


def register(app: typer.Typer) -> None:
    @app.command("inspect")
    def command(
        checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or safetensors file.")],
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
        tp: Annotated[int | None, typer.Option(min=1, help="Plan for so many ranks: who holds what.")] = None,
        ep: Annotated[int, typer.Option(min=1, help="Of the plan: groups of ranks that hold whole experts.")] = 1,
        numerics: Annotated[str, typer.Option(help="Of the plan: whose activation groups count.")] = "reference",
    ) -> None:
        """Formats, scale dtypes, ragged shapes, sizes, and the fit for tensor parallelism. Reads headers only.

        --tp 8 --ep 4: the sharding plan and the bytes of each rank, or why there is none.
        Exit codes: 0; 2 when something in the checkpoint does not fit together.
        """
        found = open_checkpoint(checkpoint)
        summary = summarize(found)
        policy = model_policy(numerics, found.config)
        summary["tensor_parallel"] = verdicts(found, policy) if found.layers else []
        if tp is not None or ep > 1:
            summary["plan"] = summarize_plan(plan_sharding(found, tp or ep, ep, policy))
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
    if "plan" in summary:
        _show_plan(out, summary["plan"])


def _show_plan(out: Console, plan: dict[str, Any]) -> None:
    table = Table("weight", "layers", "stored", "held", "on each rank", "inside blocks", title="sharding plan")
    for row in plan["rows"]:
        inside = [f"as {', '.join(row['part_formats'])}"] if row["part_formats"] else []
        inside += [f"{row['cut_groups']} activation groups on two ranks"] if row["cut_groups"] else []
        held = f"{row['kind']} ({row['reason']})" if row["reason"] else row["kind"]
        stored = f"{row['format']} {' x '.join(map(str, row['shape']))}"
        parts = f"{row['cut']} {_runs(row['parts'])}" if row["parts"] else "whole" if row["kind"] != "unused" else "-"
        table.add_row(row["name"], str(row["layers"]), stored, held, parts, "; ".join(inside))
    out.print(table)
    sizes = ", ".join(f"{rank}: {_size(n)}" for rank, n in enumerate(plan["bytes"]))
    out.print(f"bytes a rank ({_size(plan['replicated_bytes'])} of them on every rank): {sizes}", highlight=False)


def _runs(sizes: list[int]) -> str:
    """8, 8, 8, 4 -> "3 x 8, 4"."""
    runs = [(size, len(list(same))) for size, same in groupby(sizes)]
    return ", ".join(f"{count} x {size}" if count > 1 else str(size) for size, count in runs)


def _ranks_table(rows: list[dict[str, Any]]) -> Table:
    counts = ("whole", "aligned", "inside", "unequal")
    table = Table(
        "ranks", "tensor parallel", "whole", "whole blocks", "cut inside a block", "unequal shares", "which, why"
    )
    for row in rows[1:]:
        kinds = row["kinds"]["inside"] or row["kinds"]["unequal"]
        notes = [kinds[0] + (f" and {len(kinds) - 1} more" if len(kinds) > 1 else "")] if kinds else []
        notes += row["reasons"][:1]
        table.add_row(str(row["ranks"]), row["verdict"], *(str(row[kind]) for kind in counts), "; ".join(notes))
    return table


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"
