"""The LoRA example's parts. The whole of it runs on the demo's model: `python examples/lora.py .cache/smollm2-fp8`."""

import importlib.util
from pathlib import Path

import pytest
import torch

import blockscale
from blockscale.nn import Linear

SPEC = importlib.util.spec_from_file_location("lora", Path(__file__).parents[2] / "examples" / "lora.py")
lora = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(lora)


def test_adapters_learn_and_the_base_keeps_its_bytes():
    model = torch.nn.ModuleDict({"q_proj": Linear(blockscale.quantize(torch.randn(96, 192), "fp8_128x128"))})
    model["other"] = torch.nn.Linear(96, 96)
    x, target = torch.randn(16, 192), torch.randn(16, 96)
    before, plain = lora.stored_bytes(model), model["q_proj"](x)
    parameters = lora.add_adapters(model, ("q_proj",))
    assert len(parameters) == 2
    assert torch.equal(model["q_proj"](x), plain)  # B is zero at first
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (model["other"](model["q_proj"](x)) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert lora.stored_bytes(model) == before
    with pytest.raises(AssertionError, match="not a block-scaled layer"):
        lora.add_adapters(model, ("other",))
