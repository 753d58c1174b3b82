"""`blockscale tune`: measure the Hopper kernels' configurations on this card and keep the best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..checkpoint import open_checkpoint
from ..errors import BlockscaleError
from ..formats import get_format
from ..platform import Platform, detect
from ..registry import Problem, answers_to, explain
from ._output import console, print_json

_M = "1,8,16,32,64,128,256,512,1024,2048,4096,8192"


def register(app: typer.Typer) -> None:
    app.command("tune")(command)


def command(
    checkpoint: Annotated[Path | None, typer.Argument(help="Checkpoint folder: all its FP8 128x128 layers.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="N,K of a weight; may be given again.")] = None,
    m: Annotated[str, typer.Option(help="Token counts.")] = _M,
    device: Annotated[str, typer.Option(help="The card: cuda, cuda:1 …")] = "cuda",
    workers: Annotated[int, typer.Option(min=1, help="Processes that compile and check.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the Hopper kernels' configurations for these weights and keep the fastest for later processes.

    The table lies in $BLOCKSCALE_TABLES, else in the user's cache; delete the file to forget it.
    """
    shapes = [_pair(text) for text in shape or []]
    if checkpoint is not None:
        shapes += _layers(checkpoint)
    if not shapes:
        raise BlockscaleError("tune: needs a checkpoint or --shape N,K")
    ms = _numbers(m, "--m M,M …")
    for n, k in dict.fromkeys(shapes):
        _check_served(n, k, detect(device))  # before triton is loaded, which may not be there
    from ..kernels.gluon import tables
    from ..kernels.gluon.tune import Tuned, table, tune

    def show(tuned: Tuned) -> None:
        if not as_json:
            before = "not measured" if tuned.before_us is None else f"{tuned.before_us:.2f} us"
            at = "x".join(map(str, tuned.shape))
            console().print(f"{at}: {tuned.best} {tuned.best_us:.2f} us (before: {tuned.before} {before})")

    found = tune(
        [(rows, n, k) for n, k in dict.fromkeys(shapes) for rows in ms], device, workers=workers, progress=show
    )
    path = tables.write(detect(device).value("chip") or "unknown", table(found))
    if as_json:
        print_json({"table": str(path), "rows": [vars(t) for t in found]})
    else:
        console().print(f"{len(found)} shapes -> {path}")


def _check_served(n: int, k: int, platform: Platform) -> None:
    """Raises BlockscaleError with the Hopper kernels' own reasons where none of them takes such a weight."""
    problem = Problem("linear", n, k, torch.bfloat16, get_format("fp8_128x128"))
    found = [d for d in explain(problem, platform) if answers_to(d.kernel, "gluon")]
    if not any(decision.accepted for decision in found):
        reasons = dict.fromkeys(reason for decision in found for reason in decision.reasons)
        raise BlockscaleError(f"tune: the Hopper kernels do not serve {n}x{k} on {platform}: {'; '.join(reasons)}")


def _numbers(text: str, need: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise BlockscaleError(f"tune: {need} needs whole numbers from 1 up, got {text!r}")
    return numbers


def _pair(text: str) -> tuple[int, int]:
    numbers = _numbers(text, "--shape N,K")
    if len(numbers) != 2:
        raise BlockscaleError(f"tune: --shape needs N,K, got {text!r}")
    return numbers[0], numbers[1]


def _layers(checkpoint: Path) -> list[tuple[int, int]]:
    """N, K of every stored FP8 matrix in blocks of 128x128."""
    found = open_checkpoint(checkpoint)
    shapes = [
        (layer.shape[0], layer.shape[1])
        for layer in found.layers
        if len(layer.shape) == 2 and layer.format.block == (128, 128) and layer.format.element.name == "fp8"
    ]
    if not shapes:
        raise BlockscaleError(f"tune: {checkpoint} has no FP8 matrix in blocks of 128x128")
    return shapes
