"""Tiny models of every family on an accelerator against the same on the CPU: one script for a borrowed machine.

`python bench/device_models.py [DEVICE] [--jobs N] [--out FILE] [--cases v3,v3.2]` (default: the first accelerator, one
process, every case, bench/results/device_models.json); `--table FILE` prints an earlier report, for docs/models.md.
fp32 compute. What is compared and what "agree" means is in tests/model_agreement.py. For each checkpoint:

- layers: every linear on the CPU's inputs, of four prompts and of their first tokens, against fp64 products: elements
  within conformance's bound, rows within the tolerance that follows from what the kernel declares of its sums;
- tokens: greedy tokens, generated one by one with the device's own cache along the CPU's tokens, equal those of an
  independent dequantize-and-fake-quantize model in fp64 wherever its lead exceeds what the tolerance can take away;
- offloading: with the second layer on the CPU and `offload_buffers=True`, the logits are the same bits;
- memory: in the checkpoint's own dtype, allocated bytes within 5 % of the stored ones; block-scaled weights exactly
  the bytes of the file. The report has the peak of the prompts in fp32 compute beside it.

Ends with status 1 when one of these fails. Each result is written as soon as it is there. transformers 5.23 is needed;
where it is not installed, a wheel in a folder on PYTHONPATH will do (`pip install --no-deps --target`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import model_agreement as agree  # noqa: E402
import naive_models  # noqa: E402
from blockscale import nn  # noqa: E402
from blockscale.checkpoint import open_checkpoint  # noqa: E402
from blockscale.integrations import transformers as integration  # noqa: E402
from blockscale.integrations.transformers import measure  # noqa: E402
from model_cases import CASES, SELECTIVE  # noqa: E402

NAMES = ("v3", "v3.2", "v4-fp4", "v4-fp8", "v4-nvfp4", "v4-32", "qwen3-moe-ragged", "minimax-m2", *SELECTIVE)
PROMPTS, PROMPT, NEW, DRAWS = 4, 48, 16, 32
HEADER = (
    "| model | of bound | row error | allowed | decided | same | same, CPU | beyond | allocated / stored | offloaded |"
    "\n" + "|---" * 10 + "|"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default=str(torch.accelerator.current_accelerator() or ""))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cases", type=lambda s: s.split(","), default=list(NAMES))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "device_models.json")
    parser.add_argument("--table", type=Path, help="print an earlier report and measure nothing")
    options = parser.parse_args()
    if options.table:
        models = json.loads(options.table.read_text())["models"]
        print("\n".join([HEADER, *(row(name, models[name]) for name in NAMES if name in models)]))
        return 0
    assert options.device, "no accelerator here: name a device"
    versions = f"torch {torch.__version__}, transformers {sys.modules['transformers'].__version__}"
    report: dict[str, Any] = {
        "chip": chip(options.device),
        "versions": versions,
        "device": options.device,
        "models": {},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(HEADER, flush=True)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(compare, name, options.device): name for name in options.cases}
        for done in as_completed(running):
            name = running[done]
            error = done.exception()  # of one case: the others go on
            result = {"passed": False, "error": repr(error)} if error else done.result()
            report["models"][name] = result
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            print(f"| {name} | {error!r} |" if error else row(name, result), flush=True)
    return int(not all(r["passed"] for r in report["models"].values()))


def chip(device: str) -> str:
    return "CPU" if device.startswith("cpu") else torch.get_device_module(device).get_device_name(torch.device(device))


def row(name: str, r: dict[str, Any]) -> str:
    tokens, cpu, memory = r["tokens"], r["cpu_tokens"], r["memory"]
    worst, offloaded = r["worst_layer"], {True: "equal", False: "other bits", None: "-"}[r["same_when_offloaded"]]
    return (
        f"| {name} | {r['of_bound']:.2f} | {worst['row_error']:.1e} | {worst['allowed']:.1e} | {tokens['decided']} of "
        f"{tokens['positions']} | {tokens['same']} | {cpu['same']} | {tokens['beyond']} + {cpu['beyond']} | "
        f"{memory['allocated_over_stored']:.4f} | {offloaded} |" + ("" if r["passed"] else " FAILED")
    )


def compare(name: str, device: str) -> dict[str, Any]:
    """Everything about one case; runs in a process of its own."""
    clock = [("begin", time.perf_counter())]
    torch.set_num_threads(max(1, torch.get_num_threads() // len(NAMES)))
    case = (CASES | SELECTIVE)[name]
    with tempfile.TemporaryDirectory() as scratch:
        stored = case.write(Path(scratch) / "stored", **({"mtp": False} if name.startswith("v") else {}))
        memory = measure_memory(stored, device)
        here = integration.load(stored, dtype=torch.float32, kernel="reference")
        there = integration.load(stored, dtype=torch.float32, device=device)
        clock.append(("load", time.perf_counter()))
        offloaded = same_when_offloaded(stored, there, device)
        clock.append(("offloaded", time.perf_counter()))
        plain = naive_models.plain_checkpoint(stored, Path(scratch) / "plain")
        naive = naive_models.model(plain, naive_models.quantized_linears(here), **case.acts).double()
    ids = prompts()
    inputs = agree.layer_inputs(here, ids)
    checks = agree.check_layers(there, here, inputs)
    checks += agree.check_layers(there, here, agree.layer_inputs(here, ids[:, :1]))
    clock.append(("layers", time.perf_counter()))
    worst = max(checks, key=lambda c: c.row_error / c.allowed)
    sequences = here.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    with torch.inference_mode():
        truth = naive(sequences[:, :-1]).logits[:, -NEW:]
    allowed = agree.tolerances(there, inputs)
    bound = agree.lead_bound(here, sequences[:, :-1], truth, allowed, draws=DRAWS)
    clock.append(("cpu", time.perf_counter()))
    tokens, cpu = (agree.agreement(agree.step_logits(m, sequences, PROMPT), truth, bound) for m in (there, here))
    clock.append(("tokens", time.perf_counter()))
    seconds = {name: end - begin for (_, begin), (name, end) in pairwise(clock)}
    passed = (
        all(c.passed for c in checks)
        and tokens.beyond + cpu.beyond == 0
        and memory["passed"]
        and offloaded is not False
    )
    return {
        "passed": passed,
        "layers": len(checks),
        "of_bound": max(c.of_bound for c in checks),
        "worst_layer": asdict(worst),
        "worst_of_each_kernel": {c.kernel: c.row_error for c in sorted(checks, key=lambda c: c.row_error)},
        "failed_layers": [asdict(c) for c in checks if not c.passed][:8],
        "tokens": asdict(tokens),
        "cpu_tokens": asdict(cpu),
        "median_lead_bound": float(bound.median()),
        "memory": memory,
        "weights_in_fp32_compute": measure.weight_bytes(there),
        "peak_in_fp32_compute": measure.peak_memory(device),
        "same_when_offloaded": offloaded,
        "kernels_decode": measure.kernels_in_use(there, 1),
        "kernels_prefill": measure.kernels_in_use(there, PROMPTS * PROMPT),
        "seconds": seconds,
    }


def prompts() -> torch.Tensor:
    return torch.randint(2, 300, (PROMPTS, PROMPT), generator=torch.Generator().manual_seed(5))


def same_when_offloaded(stored: Path, there: Any, device: str) -> bool | None:
    """A layer whose weights wait on the CPU gives the logits of one that holds them. None on a CPU: nothing to do."""
    if torch.device(device).type == "cpu":
        return None
    parts = [f"model.{n}" for n, _ in there.model.named_children() if n != "layers"]
    parts += [n for n, _ in there.named_children() if n != "model"]
    layers = {f"model.layers.{i}": there.device for i in range(len(there.model.layers))}
    device_map = dict.fromkeys(parts, there.device) | layers | {"model.layers.1": "cpu"}
    model = integration.load(stored, dtype=torch.float32, device_map=device_map, offload_buffers=True)
    held = [m for m in model.model.layers[1].modules() if isinstance(m, nn.WeightModule)]
    ids = prompts().to(there.device)
    with torch.inference_mode():
        same = torch.equal(model(ids).logits, there(ids).logits)
    return same and all(m.quantized.data.is_meta for m in held)


def measure_memory(stored: Path, device: str) -> dict[str, Any]:
    """Of the model in its checkpoint's dtype, after loading."""
    on_cpu = torch.device(device).type == "cpu"  # whose allocator does not count
    api = torch.get_device_module(device)
    before = 0 if on_cpu else api.memory_allocated(device)
    model = integration.load(stored, device=device)
    checkpoint = open_checkpoint(stored)
    scaled = sum(
        part.nbytes
        for m in model.modules()
        if isinstance(m, nn.WeightModule)
        for part in (m.quantized.data, m.quantized.scale, m.quantized.global_scale, m.quantized.input_scale)
        if part is not None
    )
    in_file = sum(
        checkpoint.tensors[n].nbytes
        for layer in checkpoint.layers
        for n in (layer.parts.data, layer.parts.scale, layer.parts.global_scale, layer.parts.input_scale)
        if n
    )
    allocated = measure.weight_bytes(model) if on_cpu else api.memory_allocated(device) - before
    return {
        "stored": checkpoint.nbytes,
        "allocated": allocated,
        "allocated_over_stored": allocated / checkpoint.nbytes,
        "block_scaled": scaled,
        "block_scaled_in_file": in_file,
        "passed": scaled == in_file and allocated <= 1.05 * checkpoint.nbytes,
    }


if __name__ == "__main__":
    sys.exit(main())
