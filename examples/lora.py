"""LoRA on a frozen FP8 model: the base stays as stored, adapters beside it learn.

python examples/lora.py CHECKPOINT [--text FILE] [--steps N]

CHECKPOINT: a block-scaled folder, e.g. `.cache/smollm2-fp8` that `make demo` leaves. Gradients pass straight
through the quantization of activations and through the dequantized weights; stored bytes have none.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from blockscale.integrations import transformers as blockscale_transformers
from blockscale.nn import Linear


class Adapter(nn.Module):
    """`base(x) + B(A(x)) * alpha / rank`, with B zero at first (Hu et al., LoRA, 2021)."""

    def __init__(self, base: Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        self.base, self.factor = base, alpha / rank
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x.float())).to(x.dtype) * self.factor


def add_adapters(model: nn.Module, names: tuple[str, ...] = ("q_proj", "v_proj")) -> list[nn.Parameter]:
    """Freeze the model, put an adapter beside each named layer, and return what can be trained."""
    model.requires_grad_(False)
    found = [(parent, name) for parent in model.modules() for name, m in parent.named_children() if name in names]
    for parent, name in found:
        base = getattr(parent, name)
        assert isinstance(base, Linear), f"{name} is {type(base).__name__}, not a block-scaled layer"
        setattr(parent, name, Adapter(base))
    return [p for p in model.parameters() if p.requires_grad]


def stored_bytes(model: nn.Module) -> str:
    """A hash of every stored byte: the same before and after training."""
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, Linear):
            for t in (module.quantized.data, module.quantized.scale):
                digest.update(t.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def train(checkpoint: Path, text: str, steps: int, tokens: int = 128, rate: float = 2e-3) -> list[float]:
    """Losses of each step on the same few lines: what falls is the adapters' doing."""
    torch.manual_seed(0)
    model = blockscale_transformers.load(checkpoint, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt").input_ids[:, :tokens]
    before, parameters = stored_bytes(model), add_adapters(model)
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    print(f"{sum(p.numel() for p in parameters):,} parameters to train, base frozen; {ids.shape[1]} tokens")
    losses = []
    for step in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
    assert stored_bytes(model) == before, "training changed stored bytes"
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, help="what to learn; default: this file")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    losses = train(args.checkpoint, (args.text or Path(__file__)).read_text(encoding="latin1"), args.steps)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
