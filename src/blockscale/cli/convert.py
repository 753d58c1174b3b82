"""`blockscale convert` and `blockscale dequantize`: from one checkpoint format to another, and back to floats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint import convert_checkpoint, dequantize_checkpoint
from ..checkpoint.job import Result
from ..errors import BlockscaleError
from ._output import console
from ._progress import first_rank, listening
from .quantize import parse_size

_Src = Annotated[Path, typer.Argument(help="Block-scaled checkpoint folder.")]
_Dst = Annotated[Path, typer.Argument(help="New folder. An unfinished run of the same request is resumed.")]
_ShardSize = Annotated[str, typer.Option(help="Largest file written, e.g. 500M, 2G.")]
_Workers = Annotated[int, typer.Option(help="Processes.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]


def register(app: typer.Typer) -> None:
    @app.command("convert")
    def convert(
        src: _Src,
        dst: _Dst,
        format: Annotated[str | None, typer.Option(help="Weight format; else each layer keeps its own.")] = None,
        style: Annotated[
            str | None,
            typer.Option(help="deepseek, deepseek_v4, modelopt, compressed_tensors, gpt_oss; else as it is."),
        ] = None,
        scale_dtype: Annotated[str | None, typer.Option(help="How scales are stored: f32, bf16, e8m0, u8.")] = None,
        only: Annotated[list[str] | None, typer.Option(help="Glob over modules: convert only these.")] = None,
        skip: Annotated[list[str] | None, typer.Option(help="Glob over modules: leave these.")] = None,
        allow_requantize: Annotated[
            bool, typer.Option("--allow-requantize", help="Quantize anew what cannot be exact, and report the error.")
        ] = False,
        report: Annotated[str, typer.Option(help="Measure errors: 'sample' or 'full'.")] = "sample",
        shard_size: _ShardSize = "2G",
        workers: _Workers = 1,
        as_json: _Json = False,
    ) -> None:
        """Convert to another format, style or scale dtype without changing a value, or refuse.

        Exit codes: 0 done; 2 refused because values would change, bad input, another DST; 130 interrupted.
        """
        if report not in ("sample", "full"):
            raise BlockscaleError(f"convert: --report needs one of sample, full, got {report!r}")
        options: dict[str, Any] = {"style": style, "scale_dtype": scale_dtype, "requantize": allow_requantize}
        options |= {"only": tuple(only or ()), "skip": tuple(skip or ()), "report": report}
        options["shard_size"] = parse_size(shard_size)
        with listening(as_json) as listen:
            result = convert_checkpoint(src, dst, format, workers=workers, listen=listen, **options)
        if not as_json and first_rank():
            _show(result)

    @app.command("dequantize")
    def dequantize(
        src: _Src,
        dst: _Dst,
        dtype: Annotated[str, typer.Option(help="bf16, f16 or f32.")] = "bf16",
        shard_size: _ShardSize = "2G",
        workers: _Workers = 1,
        as_json: _Json = False,
    ) -> None:
        """Write every block-scaled weight as plain floats. FP8 with power-of-two scales and FP4 are exact in BF16.

        Exit codes: 0 done; 2 bad input, another DST; 130 interrupted.
        """
        size = parse_size(shard_size)
        with listening(as_json) as listen:
            result = dequantize_checkpoint(src, dst, dtype, workers=workers, listen=listen, shard_size=size)
        if not as_json and first_rank():
            _show(result)


def _show(result: Result) -> None:
    out = console()
    if result.existed:
        out.print(f"{result.path}: complete already, left as it is", highlight=False)
        return
    layers = [r for r in result.records if "exact" in r]
    inexact = [r for r in layers if not r["exact"]]
    out.print(f"{result.path}: {len(layers)} layers, {len(layers) - len(inexact)} exactly", highlight=False)
    for record in sorted(inexact, key=lambda r: -float(r["relative_error"]))[:10]:
        out.print(f"  {record['name']}: relative error {record['relative_error']:.3g}", highlight=False)
    if len(inexact) > 10:
        out.print(f"  … and {len(inexact) - 10} more, in quantization_report.json", highlight=False)
