"""`blockscale quantize`: make a block-scaled checkpoint."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint import quantize_checkpoint
from ..checkpoint.job import Result
from ..checkpoint.report import left_alone
from ..errors import BlockscaleError
from ._output import console
from ._progress import first_rank, listening

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def register(app: typer.Typer) -> None:
    @app.command("quantize")
    def command(
        src: Annotated[Path, typer.Argument(help="Checkpoint folder (safetensors), or a .gguf file.")],
        dst: Annotated[Path, typer.Argument(help="New folder. An unfinished run of the same request is resumed.")],
        format: Annotated[str, typer.Option(help="Weight format, e.g. fp8_128x128, mxfp4.")] = "fp8_128x128",
        style: Annotated[
            str | None,
            typer.Option(help="deepseek, deepseek_v4, modelopt, compressed_tensors, gpt_oss; else the usual one."),
        ] = None,
        scale_dtype: Annotated[str | None, typer.Option(help="How scales are stored: f32, bf16, e8m0, u8.")] = None,
        only: Annotated[list[str] | None, typer.Option(help="Glob over modules: quantize only these.")] = None,
        skip: Annotated[list[str] | None, typer.Option(help="Glob over modules: leave these too.")] = None,
        nan: Annotated[str, typer.Option(help="NaN and infinities: 'error' or 'keep'.")] = "error",
        scales: Annotated[str, typer.Option(help="'amax', or 'mse': search the least square error.")] = "amax",
        report: Annotated[str, typer.Option(help="Measure errors: 'sample', 'full' or 'none'.")] = "sample",
        shard_size: Annotated[str, typer.Option(help="Largest file written, e.g. 500M, 2G.")] = "2G",
        workers: Annotated[int, typer.Option(help="Processes.")] = 1,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    ) -> None:
        """Quantize the linear weights of a model. Embeddings, heads, norms and routers stay as they are.

        Exit codes: 0 done, or DST was complete already; 2 bad input, another DST, a full or read-only disk; 130
        interrupted. After 2 or 130 the same command goes on where it stopped.
        """
        options: dict[str, Any] = {"style": style, "scale_dtype": scale_dtype, "shard_size": parse_size(shard_size)}
        for name, value, known in (
            ("nan", nan, ("error", "keep")),
            ("scales", scales, ("amax", "mse")),
            ("report", report, ("sample", "full", "none")),
        ):
            if value not in known:
                raise BlockscaleError(f"quantize: --{name} needs one of {', '.join(known)}, got {value!r}")
            options[name] = value
        options |= {"only": tuple(only or ()), "skip": tuple(skip or ())}
        with listening(as_json) as listen:
            result = quantize_checkpoint(src, dst, format, workers=workers, listen=listen, **options)
        if not as_json and first_rank():
            show_result(result)


def show_result(result: Result) -> None:
    """One line about what was done."""
    out = console()
    if result.existed:
        out.print(f"{result.path}: complete already, left as it is", highlight=False)
        return
    _show_left(left_alone(result.records))
    measured = [r for r in result.records if "relative_error" in r]
    kept = f", {result.kept} of them from an earlier run" if result.kept else ""
    out.print(f"{result.path}: {len(result.records)} tensors in {result.shards} files{kept}", highlight=False)
    if measured:
        worst = max(measured, key=lambda r: float(r["relative_error"]))
        mean = sum(float(r["relative_error"]) for r in measured) / len(measured)
        line = f"{len(measured)} quantized, relative error {mean:.4f} on average, worst {worst['relative_error']:.4f}"
        out.print(f"{line} ({worst['name']})", highlight=False)


def _show_left(left: list[dict[str, Any]]) -> None:
    """What one would expect to be quantized and is not, on stderr: alike ones in one line."""
    kinds: dict[tuple[str, str], int] = {}
    for found in left:
        key = (re.sub(r"\.\d+(?=\.|$)", ".*", str(found["name"])), str(found["reason"]))
        kinds[key] = kinds.get(key, 0) + 1
    for (name, reason), count in kinds.items():
        print(f"warning: NOT quantized: {name} ({count} of them): {reason}", file=sys.stderr)


def parse_size(text: str) -> int:
    """Bytes from "500M" or "2G". Raises BlockscaleError."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in _UNITS else (text, "")
    if not number.isdigit() or int(number) == 0:
        raise BlockscaleError(f"size: needs a number with K, M or G, got {text!r}")
    return int(number) * _UNITS.get(unit, 1)
