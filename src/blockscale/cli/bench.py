"""`blockscale bench model`: what a checkpoint does on this machine, without a tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ..errors import BlockscaleError
from . import _ranks
from ._output import check_target, console, print_json
from .run import Device, Dtype, Kernel, Numerics, integration

_PICTURES = (".png", ".svg")

bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench")


@bench.command("model")
def command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Random tokens of prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    numerics: Numerics = "reference",
    kernel: Kernel = None,
    picture: Annotated[Path | None, typer.Option(help="Write a picture of the time split (png, svg).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ep: _ranks.Ep = None,
    exchange: _ranks.Exchange = "dispatch",
    timeout: _ranks.Timeout = 60.0,
    sums: _ranks.Sums = "auto",
) -> None:
    """Prefill and decode tokens/s, memory, and the time split between our layers and the rest; random token ids.

    Under torchrun the ranks share the model; memory is then that of rank 0.
    """
    if picture is not None:
        _check_picture(picture)
    with _ranks.shared(checkpoint, device, numerics, ep, exchange, timeout, sums) as parallel:
        report = measure_model(
            checkpoint, prompt_tokens, new_tokens, device=device, dtype=dtype, numerics=numerics, kernel=kernel,
            parallel=parallel,
        )  # fmt: skip
        if not _ranks.speaks(parallel):
            return
        if picture is not None:
            draw(report, picture)
        if as_json:
            print_json(report)
        else:
            _show(report)


@torch.no_grad()
def measure_model(
    checkpoint: Path,
    prompt_tokens: int,
    new_tokens: int,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    numerics: str = "reference",
    kernel: str | None = None,
    parallel: Any = None,
) -> dict[str, Any]:
    """The report that `--json` prints. The first generation is a warm-up; logits_sha256 is of the prompt's logits."""
    from ..checkpoint import open_checkpoint

    load, measure = integration()
    where = device if parallel is None else parallel.world.device
    model = load(checkpoint, dtype=dtype, numerics=numerics, kernel=kernel, device=where, parallel=parallel)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    measure.generate(model, ids, 2, stop=False)
    timing = measure.generate(model, ids, new_tokens, stop=False)
    with torch.inference_mode(), measure.time_split(model) as prefill:
        logits = model(ids.to(model.device)).logits
    with measure.time_split(model) as decode:
        measure.generate(model, ids[:, :1], new_tokens, stop=False)
    return {
        "checkpoint": checkpoint.resolve().name,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "prefill_tokens_per_second": timing.prefill_tokens_per_second,
        "decode_tokens_per_second": timing.decode_tokens_per_second,
        "resident_weight_bytes": measure.weight_bytes(model),
        "stored_weight_bytes": open_checkpoint(checkpoint).nbytes,
        "peak_memory_bytes": measure.peak_memory(where),
        "kernels": measure.kernels_in_use(model),
        "prefill_kernels": measure.kernels_in_use(model, prompt_tokens),
        "prefill_split": prefill.as_dict(),
        "decode_split": decode.as_dict(),
        "logits_sha256": hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest(),
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "numerics": numerics,
        "ranks": _ranks.report(parallel),
    }


def _check_picture(path: Path) -> None:
    """Before minutes are spent on what it would show."""
    if path.suffix not in _PICTURES:
        raise BlockscaleError(f"--picture: needs a name ending in {' or '.join(_PICTURES)}, got {path}")
    check_target("--picture", path)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as e:
        raise BlockscaleError(f"--picture needs {e.name}: pip install 'blockscale[plots]'") from e


def draw(report: dict[str, Any], path: Path) -> None:
    """Two bars, prefill and decode: shares of the time by who spent it. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.4), layout="constrained")
    bars = {
        f"{name}\n{_speed(report[f'{name}_tokens_per_second'])}": report[f"{name}_split"]
        for name in ("decode", "prefill")  # the first is drawn lowest
    }
    left = dict.fromkeys(bars, 0.0)
    for part in ("quantized_layers", "dense_layers", "rest"):
        shares = {name: split[part] for name, split in bars.items()}
        drawn = axes.barh(list(bars), list(shares.values()), left=list(left.values()), label=part.replace("_", " "))
        labels = [f"{share:.0%}" if share > 0.04 else "" for share in shares.values()]  # narrower ones hold no text
        axes.bar_label(drawn, labels, label_type="center", color="white")
        left = {name: left[name] + share for name, share in shares.items()}
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("share of the time")
    figure.suptitle(f"{report['checkpoint']} on {report['device']}, {report['dtype']}, numerics {report['numerics']}")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _speed(tokens_per_second: float | None) -> str:
    return f"{tokens_per_second:.1f} tokens/s" if tokens_per_second else ""


def _show(report: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name in ("prefill", "decode"):
        tokens = report["prompt_tokens" if name == "prefill" else "new_tokens"]
        split = ", ".join(f"{k.replace('_', ' ')} {v:.0%}" for k, v in report[f"{name}_split"].items())
        speed = report[f"{name}_tokens_per_second"]
        table.add_row(name, f"{tokens} tokens", _speed(speed), split)
    resident, stored = report["resident_weight_bytes"], report["stored_weight_bytes"]
    table.add_row("weights", f"{resident / 1e6:.1f} MB resident", f"{stored / 1e6:.1f} MB stored", report["dtype"])
    table.add_row("peak memory", f"{report['peak_memory_bytes'] / 1e6:.1f} MB", report["device"])
    decode, prefill = report["kernels"], report["prefill_kernels"]
    for kernel, layers in decode.items():
        table.add_row("kernel" if decode == prefill else "decode kernel", kernel, f"{layers} layers")
    for kernel, layers in prefill.items() if decode != prefill else ():
        table.add_row("prefill kernel", kernel, f"{layers} layers")
    _ranks.add_rows(table, report["ranks"])
    console().print(table)
