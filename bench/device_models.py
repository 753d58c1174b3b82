"""Tiny models of every family on an accelerator against the same on the CPU: one script for a borrowed machine.

`python bench/device_models.py [DEVICE]` (default: the first accelerator). fp32 compute. For each checkpoint:

- every block-scaled layer gets the same input on both sides; the worst row error relative to the row's norm is kept;
- greedy tokens must agree wherever the CPU's top-1 margin exceeds the bound that the tolerance implies: logits that
  differ by 1e-2 of their root mean square differ by at most 4e-2 of it in any one (four standard deviations), and two
  of them can change places only where they are 8e-2 of it apart;
- allocated bytes after loading are compared with the stored bytes.

Writes bench/results/device_models.json and ends with status 1 when one of the checks fails. Layers quantize their
inputs, so a difference of 1e-7 before may be one of 6e-2 after in the few elements on a rounding edge: the layers are
compared on equal inputs, the models by margin.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from blockscale import nn  # noqa: E402
from blockscale.integrations import transformers as integration  # noqa: E402
from blockscale.integrations.transformers import measure  # noqa: E402
from makers import make_deepseek_v3, make_deepseek_v4, make_minimax_m2, make_qwen3_moe  # noqa: E402

CASES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "v3": (make_deepseek_v3, {"mtp": False}),
    "v3.2": (make_deepseek_v3, {"v32": True, "mtp": False}),
    "v4-fp4": (make_deepseek_v4, {"mtp": False}),
    "v4-fp8": (make_deepseek_v4, {"experts": "fp8", "mtp": False}),
    "v4-nvfp4": (make_deepseek_v4, {"experts": "nvfp4", "mtp": False}),
    "v4-32": (make_deepseek_v4, {"block": 32, "mtp": False}),
    "qwen3-moe-ragged": (make_qwen3_moe, {"intermediate": 192}),
    "minimax-m2": (make_minimax_m2, {}),
}
ROW_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-2
NEW_TOKENS = 16


def main() -> int:
    device = torch.device(sys.argv[1]) if len(sys.argv) > 1 else torch.accelerator.current_accelerator()
    assert device is not None, "no accelerator here: name a device"
    report = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (make, options) in CASES.items():
            report[name] = compare(make(Path(scratch) / name, **options), device)
            print(name, json.dumps(report[name]), flush=True)
    out = ROOT / "bench" / "results" / "device_models.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"device": str(device), "models": report}, indent=2) + "\n")
    return int(not all(r["passed"] for r in report.values()))


def compare(folder: Path, device: torch.device) -> dict[str, Any]:
    here = integration.load(folder, dtype=torch.float32)
    before = allocated_bytes(device)
    there = integration.load(folder, dtype=torch.float32, device=device)
    allocated = allocated_bytes(device) - before
    ids = torch.randint(2, 300, (1, 48), generator=torch.Generator().manual_seed(5))
    layers = worst_layer(here, there, ids)
    tokens, same, explained = greedy(here, there, ids)
    resident = measure.weight_bytes(there)
    return {
        "worst_layer_row_error": layers,
        "tokens": tokens,
        "same": same,
        "different_within_the_bound": explained,
        "allocated_over_weights": allocated / resident,
        "kernels": measure.kernels_in_use(there, 48),
        "passed": layers <= ROW_TOLERANCE and same + explained == tokens and allocated <= 1.05 * resident + (1 << 20),
    }


def allocated_bytes(device: torch.device) -> int:
    """Of torch's allocator; 0 on a CPU, which has none that counts."""
    return 0 if device.type == "cpu" else int(torch.get_device_module(device).memory_allocated(device))


def worst_layer(here: Any, there: Any, ids: torch.Tensor) -> float:
    """Worst row error of any layer, given the CPU's inputs on both sides."""
    worst = 0.0
    seen: dict[str, tuple[tuple[torch.Tensor, ...], torch.Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (args, y)}))
        for name, m in here.named_modules()
        if isinstance(m, nn.WeightModule)
    ]
    with torch.inference_mode():
        here(ids)
        for hook in hooks:
            hook.remove()
        for name, (args, want) in seen.items():
            got = there.get_submodule(name)(*(a.to(there.device) for a in args)).cpu()
            error, norm = (got - want).flatten(0, -2).norm(dim=-1), want.flatten(0, -2).norm(dim=-1)
            worst = max(worst, float((error / norm.clamp(min=1e-20))[norm > 0].max()))
    return worst


def greedy(here: Any, there: Any, ids: torch.Tensor) -> tuple[int, int, int]:
    """(positions, equal tokens, different ones within the bound), both models forced along the CPU's tokens."""
    same = explained = 0
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            want, got = here(ids).logits[0, -1], there(ids.to(there.device)).logits[0, -1].cpu()
        first, second = want.topk(2).values.tolist()
        bound = 2 * 4 * LOGIT_TOLERANCE * float(want.square().mean().sqrt())
        if want.argmax() == got.argmax():
            same += 1
        elif first - second <= bound:
            explained += 1
        ids = torch.cat([ids, want.argmax().reshape(1, 1)], 1)
    return NEW_TOKENS, same, explained


if __name__ == "__main__":
    sys.exit(main())
