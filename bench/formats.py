"""One model in every format: size, perplexity, top-1 agreement and speed, as a Markdown table.

`python bench/formats.py [NUMERICS]` quantizes SmolLM2-135M (fetched by the demo) to FP8, FP8 with power-of-two scales,
MXFP8, MXFP4 and NVFP4, where that was not done before, and measures each in a process of its own; "make" instead of
NUMERICS only quantizes. NUMERICS is weight_only unless it is given: what the weights alone cost. Speeds are medians of
rounds that go through all formats in turn. Prints the table of docs/models.md and writes bench/results/formats.json.
"""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from demo import ROUNDS, Process, checked, cli, weights
from demo_model import CACHE, bf16_model, text

FORMATS = ("fp8_128x128", "fp8_128x128_ue8m0", "mxfp8", "mxfp4", "nvfp4")
RESULTS = Path(__file__).parent / "results" / "formats.json"


def main() -> None:
    numerics = sys.argv[1] if len(sys.argv) > 1 else "weight_only"
    text()  # fetched here, not by all workers at once
    models = {"bf16": bf16_model()} | {name: quantized(name) for name in FORMATS}
    if numerics == "make":
        return
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                Process("stock", folder, "bfloat16")
                if name == "bf16"
                else Process("blockscale", folder, "bfloat16", numerics)
            )
            for name, folder in models.items()
        }
        rows = {
            name: {
                "bytes": weights(models[name]),
                "kernels": checked(name, worker.ask("load"))["kernels"],
                **checked(name, worker.ask("perplexity")),
            }
            for name, worker in workers.items()
        }
        rounds = [{name: checked(name, w.ask("generate")) for name, w in workers.items()} for _ in range(1 + ROUNDS)]
    truth = rows["bf16"]["top"]
    for name, row in rows.items():
        row["top1_agreement"] = statistics.mean(a == b for a, b in zip(row.pop("top"), truth, strict=True))
        for speed in ("decode", "prefill"):
            row[speed] = statistics.median(done[name][speed] for done in rounds[1:])  # the first warms up
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"numerics": numerics, "formats": rows}, indent=2) + "\n")
    print("\n".join(table(rows)))


def quantized(name: str) -> Path:
    folder = CACHE / f"smollm2-{name}"
    if not folder.is_dir():
        cli("quantize", bf16_model(), folder, "--format", name)
    return folder


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| format | MB | perplexity | same top token as bf16 | decode, tokens/s | prefill, tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        lines.append(
            f"| {name} | {r['bytes'] / 1e6:.1f} | {r['perplexity']:.3f} | {100 * r['top1_agreement']:.1f} % | "
            f"{r['decode']:.1f} | {r['prefill']:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
