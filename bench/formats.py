"""One model in every format: size, perplexity, top-1 agreement and decode speed, as a Markdown table.

`python bench/formats.py [NUMERICS]` quantizes SmolLM2-135M (fetched by the demo) to FP8, FP8 with power-of-two scales,
MXFP8, MXFP4 and NVFP4 and measures each in a process of its own. NUMERICS is weight_only unless it is given: what the
weights alone cost. Prints the table of docs/models.md and writes bench/results/formats.json.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from demo import ROUNDS, Process, checked, cli, weights
from demo_model import CACHE, bf16_model

FORMATS = ("fp8_128x128", "fp8_128x128_ue8m0", "mxfp8", "mxfp4", "nvfp4")
RESULTS = Path(__file__).parent / "results" / "formats.json"


def main() -> None:
    numerics = sys.argv[1] if len(sys.argv) > 1 else "weight_only"
    bf16 = bf16_model()
    rows = {"bf16": row("stock", bf16)}
    truth = rows["bf16"].pop("top")
    for name in FORMATS:
        folder = CACHE / f"smollm2-{name}"
        cli("quantize", bf16, folder, "--format", name)
        rows[name] = row("blockscale", folder, numerics)
        top = rows[name].pop("top")
        rows[name]["top1_agreement"] = statistics.mean(a == b for a, b in zip(top, truth, strict=True))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"numerics": numerics, "formats": rows}, indent=2) + "\n")
    print("\n".join(table(rows)))


def row(how: str, folder: Path, *numerics: str) -> dict[str, Any]:
    with Process(how, folder, "bfloat16", *numerics) as worker:
        loaded = checked(folder.name, worker.ask("load"))
        quality = checked(folder.name, worker.ask("perplexity"))
        speeds = [checked(folder.name, worker.ask("generate"))["decode"] for _ in range(ROUNDS)]
    return {"bytes": weights(folder), **quality, "decode": statistics.median(speeds), "kernels": loaded["kernels"]}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| format | MB | perplexity | same top token as bf16 | decode, tokens/s |", "|---|---|---|---|---|"]
    for name, r in rows.items():
        agreement = f"{100 * r.get('top1_agreement', 1):.1f} %"
        lines.append(f"| {name} | {r['bytes'] / 1e6:.1f} | {r['perplexity']:.3f} | {agreement} | {r['decode']:.1f} |")
    return lines


if __name__ == "__main__":
    main()
