"""The demo: quantize a real model, look at it, run it, and compare it with stock transformers on this machine.

`python bench/demo.py` fetches SmolLM2-135M once, then measures everything anew: size, perplexity, top-1 agreement,
speed and memory of fp32, bf16 (both stock transformers) and FP8 (this library), all on the same text. The table also
goes to build/demo.json. Timings are interleaved between the three and medians are shown.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table

from blockscale.checkpoint import open_checkpoint
from demo_model import CACHE, bf16_model

ROOT = Path(__file__).parents[1]
FP8 = CACHE / "smollm2-fp8"
ROUNDS = 3
OUT = Console(soft_wrap=True)


class Process:
    """A `demo_worker.py` at the other end of two pipes."""

    def __init__(self, *args: object) -> None:
        command = [sys.executable, str(Path(__file__).with_name("demo_worker.py")), *map(str, args)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait()


def main() -> None:
    bf16 = bf16_model()
    step("Quantize: DeepSeek's format, FP8 with one fp32 scale for each 128 x 128 block")
    cli("quantize", bf16, FP8, "--format", "fp8_128x128")
    step("Inspect: what is stored, read from the headers alone")
    cli("inspect", FP8)
    step("Explain: which kernel serves each layer on this machine, and why the others do not")
    cli("explain", FP8)
    step("Stock transformers on the same FP8 checkpoint")
    stock = stock_attempt()
    OUT.print(stock)
    step("Measure: fp32 and bf16 by stock transformers, FP8 by blockscale; the same text, threads and code")
    report = measure({"fp32": ("stock", bf16, "float32"), "bf16": ("stock", bf16, "bfloat16"),
                      "blockscale": ("blockscale", FP8, "bfloat16")})  # fmt: skip
    report["bytes"] = {"fp32": as_fp32(bf16), "bf16": weights(bf16), "blockscale": weights(FP8)}
    report["stock_on_fp8"] = stock
    show(report)
    target = ROOT / "build" / "demo.json"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(target)
    OUT.print(f"\nwritten to {target.relative_to(ROOT)}")


def step(title: str) -> None:
    OUT.print(f"\n[bold]{title}[/bold]")


def cli(*args: object) -> None:
    OUT.print("$ blockscale " + " ".join(str(a).removeprefix(f"{ROOT}/") for a in args), highlight=False)
    subprocess.run([sys.executable, "-m", "blockscale", *map(str, args)], check=True)


def weights(folder: Path) -> int:
    """Bytes of the safetensors files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def as_fp32(folder: Path) -> int:
    """Bytes of the same tensors in fp32."""
    return sum(4 * math.prod(tensor.shape) for tensor in open_checkpoint(folder).tensors.values())


def stock_attempt() -> str:
    """What transformers makes of the FP8 checkpoint without this library, in one sentence."""
    with Process("stock", FP8, "bfloat16") as worker:
        loaded = worker.ask("load")
        if "error" in loaded:
            return f"fails to load: {loaded['error'].splitlines()[0][:200]}"
        result = worker.ask("perplexity")
    if "error" in result:
        return f"loads, then fails: {result['error'].splitlines()[0][:200]}"
    return f"loads without an error and has perplexity {result['perplexity']:.4g} on the demo's text"


def measure(variants: dict[str, tuple[str, Path, str]]) -> dict[str, Any]:
    """Every number of the table but the sizes, keyed by what it is and then by variant."""
    workers = {name: Process(*how) for name, how in variants.items()}
    try:
        loaded = {name: checked(name, worker.ask("load")) for name, worker in workers.items()}
        for name, worker in workers.items():
            checked(name, worker.ask("generate"))  # warm-up: first touches, thread pools
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for _ in range(ROUNDS):
            for name, worker in workers.items():
                rounds[name].append(checked(name, worker.ask("generate")))
        quality = {name: checked(name, worker.ask("perplexity")) for name, worker in workers.items()}
        split = checked("blockscale", workers["blockscale"].ask("split"))
    finally:
        for worker in workers.values():
            worker.__exit__(None, None, None)
    truth = quality["fp32"]["top"]
    speeds = {
        what: {name: statistics.median(r[what] for r in done) for name, done in rounds.items()}
        for what in ("prefill", "decode")
    }
    step_ms = 1000 / speeds["decode"]["blockscale"]
    return {
        "perplexity": {name: q["perplexity"] for name, q in quality.items()},
        "top1_agreement": {
            name: statistics.mean(a == b for a, b in zip(q["top"], truth, strict=True)) for name, q in quality.items()
        },
        "tokens_per_second": speeds,
        "peak_memory_bytes": {name: done[-1]["peak_memory_bytes"] for name, done in rounds.items()},
        "decode_step_ms": {part: share * step_ms for part, share in split.items()},
        "kernels": loaded["blockscale"]["kernels"],
        "text": {name: done[-1]["text"] for name, done in rounds.items()},
    }


def checked(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise SystemExit(f"{name}: {answer['error']}")
    return answer


def show(report: dict[str, Any]) -> None:
    for name, text in report["text"].items():
        OUT.print(f"[dim]{name}:[/dim] …{text!r}", highlight=False)
    table = Table("", "fp32", "bf16", "blockscale FP8", "FP8 / bf16", title="SmolLM2-135M on this machine")
    speeds = report["tokens_per_second"]
    rows = (
        ("weights on disk, MB", report["bytes"], 1e-6, "{:.1f}"),
        ("perplexity", report["perplexity"], 1, "{:.3f}"),
        ("top-1 agreement with fp32", report["top1_agreement"], 100, "{:.1f} %"),
        ("decode, tokens/s", speeds["decode"], 1, "{:.1f}"),
        ("prefill, tokens/s", speeds["prefill"], 1, "{:.0f}"),
        ("peak memory, MB", report["peak_memory_bytes"], 1e-6, "{:.0f}"),
    )
    for label, values, factor, form in rows:
        numbers = [form.format(values[name] * factor) for name in ("fp32", "bf16", "blockscale")]
        table.add_row(label, *numbers, f"{values['blockscale'] / values['bf16']:.3f}")
    OUT.print()
    OUT.print(table)
    parts = ", ".join(f"{part.replace('_', ' ')} {ms:.1f} ms" for part, ms in report["decode_step_ms"].items())
    OUT.print(f"a decode step of blockscale: {parts}", highlight=False)
    kernels = ", ".join(f"{name} ({layers} layers)" for name, layers in report["kernels"].items())
    OUT.print(f"kernels: {kernels}", highlight=False)
    OUT.print(f"stock transformers on the FP8 checkpoint {report['stock_on_fp8']}", highlight=False)


if __name__ == "__main__":
    main()
