"""`blockscale run`: text from a block-scaled checkpoint, and what it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.table import Table

from ..checkpoint import open_checkpoint
from ..errors import BlockscaleError
from . import _ranks
from ._output import console, print_json

Device = Annotated[str, typer.Option(help="Device: cpu, cuda, xpu …")]
Dtype = Annotated[Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help="dtype of activations.")]
Numerics = Annotated[str, typer.Option(help="reference, hf, vllm, checkpoint, weight_only …")]
Kernel = Annotated[str | None, typer.Option(help="Order this kernel or family for every layer.")]


def register(app: typer.Typer) -> None:
    @app.command("run")
    def command(
        checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
        prompt: Annotated[str, typer.Argument(help="Text to continue.")],
        max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
        numerics: Numerics = "reference",
        device: Device = "cpu",
        dtype: Dtype = "auto",
        kernel: Kernel = None,
        chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of streaming text.")] = False,
        ep: _ranks.Ep = None,
        exchange: _ranks.Exchange = "dispatch",
        timeout: _ranks.Timeout = 60.0,
        sums: _ranks.Sums = "auto",
    ) -> None:
        """Generate text on the stored bytes: tokens/s, memory, and which kernel served how many layers.

        Under torchrun the ranks share the model: torchrun --nproc-per-node 2 -m blockscale run CKPT "prompt".
        """
        with _ranks.shared(checkpoint, device, numerics, ep, exchange, timeout, sums) as parallel:
            speaks = _ranks.speaks(parallel)
            report = run(
                checkpoint, prompt, max_new_tokens, numerics=numerics, device=device, dtype=dtype, kernel=kernel,
                chat=chat, stream=speaks and not as_json, parallel=parallel,
            )  # fmt: skip
            if speaks and as_json:
                print_json(report)
            elif speaks:
                _show(report)


@torch.no_grad()
def run(
    checkpoint: Path,
    prompt: str,
    max_new_tokens: int,
    *,
    numerics: str = "reference",
    device: str = "cpu",
    dtype: str = "auto",
    kernel: str | None = None,
    chat: bool = False,
    stream: bool = False,
    parallel: Any = None,
) -> dict[str, Any]:
    """Load, generate greedily, measure: `{text, prompt_tokens, new_tokens, prefill_tokens_per_second, …}`.

    parallel: this process is one rank of many (`integrations.transformers.Parallel`).
    """
    load, measure = integration()
    tokenizer = tokenizer_of(checkpoint)
    ids = _ids(checkpoint, tokenizer, prompt, chat)
    where = device if parallel is None else parallel.world.device
    model = load(checkpoint, dtype=dtype, numerics=numerics, kernel=kernel, device=where, parallel=parallel)
    text = _Text(tokenizer, stream)
    try:
        timing = measure.generate(model, ids, max_new_tokens, on_token=text.add)
    finally:
        text.end()
    return {
        "text": text.whole,
        "prompt_tokens": timing.prompt_tokens,
        "new_tokens": len(timing.tokens),
        "prefill_tokens_per_second": timing.prefill_tokens_per_second,
        "decode_tokens_per_second": timing.decode_tokens_per_second,
        "resident_weight_bytes": measure.weight_bytes(model),
        "peak_memory_bytes": measure.peak_memory(where),
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "numerics": numerics,
        "kernels": measure.kernels_in_use(model),
        "prefill_kernels": measure.kernels_in_use(model, timing.prompt_tokens),
        "ranks": _ranks.report(parallel),
    }


def integration() -> tuple[Any, Any]:
    """`load` and `measure`, or an error that says what to install."""
    try:
        from ..integrations.transformers import load, measure
    except ModuleNotFoundError as e:
        raise BlockscaleError(f"running models needs {e.name}: pip install 'blockscale[transformers]'") from e
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return load, measure


def tokenizer_of(checkpoint: Path) -> Any:
    """transformers' tokenizer of a folder. Raises BlockscaleError where it has none."""
    from transformers import AutoTokenizer

    open_checkpoint(checkpoint)  # a folder that is not there or not whole says so itself
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as e:
        why = " ".join(str(e).split())
        why = why if len(why) <= 200 else f"{why[:200]}…"
        raise BlockscaleError(
            f"{checkpoint}: no tokenizer that transformers can read ({why}); `blockscale bench model` needs none"
        ) from e


def _ids(checkpoint: Path, tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids `[1, tokens]` of the prompt. Before the model is loaded, so that what is wrong is said at once."""
    if chat and not tokenizer.chat_template:
        raise BlockscaleError(f"{checkpoint}: --chat needs a chat template, the tokenizer has none")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
    else:
        found = tokenizer(prompt, return_tensors="pt").input_ids
    if not found.numel():
        raise BlockscaleError(f"{checkpoint}: needs a prompt of at least one token, got {prompt!r}")
    ids: torch.Tensor = found
    return ids


class _Text:
    """Token ids to text, printed as it grows. A character may need several tokens, so whole words are compared."""

    def __init__(self, tokenizer: Any, stream: bool) -> None:
        self.tokenizer, self.stream, self.ids, self.whole = tokenizer, stream, list[int](), ""

    def add(self, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        if self.stream:
            sys.stdout.write(text[len(self.whole) :])
            sys.stdout.flush()
        self.whole = text

    def end(self) -> None:
        if self.stream:
            print()


def _show(report: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2))
    speed = "{:.1f} tokens/s"
    for name, key in (("prefill", "prefill"), ("decode", "decode")):
        value = report[f"{key}_tokens_per_second"]
        tokens = report["prompt_tokens"] if key == "prefill" else report["new_tokens"]
        table.add_row(name, f"{tokens} tokens", speed.format(value) if value else "")
    table.add_row("weights", f"{report['resident_weight_bytes'] / 1e6:.1f} MB", f"{report['dtype']} activations")
    table.add_row("peak memory", f"{report['peak_memory_bytes'] / 1e6:.1f} MB", report["device"])
    for kernel, layers in report["kernels"].items():
        table.add_row("kernel", kernel, f"{layers} layers")
    _ranks.add_rows(table, report["ranks"])
    console().print(table)
