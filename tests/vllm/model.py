"""Run inside a Python that has vLLM 0.33 (see run.py): a whole model, loaded and run by vLLM's own code.

A tiny Llama is quantized by `quantize_checkpoint`. Executed for real: vLLM's reading of its config.json, its loader,
its fused and parallel linear layers and their weight loaders, `Fp8LinearMethod`, its Llama. One thing stands in:
attention itself (torch's), because the CUDA wheel has no CPU kernels for it. The other tests are in real.py.
"""

import os

os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # a CUDA wheel on a machine without a GPU

import pytest
import torch
from torch.nn import functional as F
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model
from vllm.plugins import load_general_plugins

from blockscale import get_format, get_numerics, observe, reference
from blockscale.checkpoint import quantize_checkpoint
from blockscale.tensor import BlockScaled
from makers import make_llama

TOKENS = torch.arange(20) * 7 % 300
NUMERICS = get_numerics("checkpoint,act_group=128,act_rounding=none")


@pytest.fixture(scope="module", params=["fp8_128x128", "fp8_128x128_ue8m0"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder / "bf16", hidden=256, intermediate=512)
    quantize_checkpoint(folder / "bf16", folder / "fp8", request.param)
    load_general_plugins()
    described = ModelConfig(model=str(folder / "fp8"), dtype="bfloat16", skip_tokenizer_init=True)
    config = VllmConfig(model_config=described)
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, "gloo")
            initialize_model_parallel()
        yield get_model(vllm_config=config)


def quantized(model):
    return {n: m for n, m in model.named_modules() if hasattr(getattr(m, "quant_method", None), "fp8_linear")}


def test_every_quantized_layer_is_ours(model):
    layers = quantized(model)
    assert len(layers) == 8  # two blocks: q, k and v in one, o, gate and up in one, down
    assert {type(m.quant_method.fp8_linear).__name__ for m in layers.values()} == {"BlockscaleFp8BlockLinearKernel"}


def attention(self, q, k, v, *args, **kwargs):
    heads = [t.view(len(t), -1, self.head_size).transpose(0, 1) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    return out.transpose(0, 1).reshape(q.shape)


def test_vllm_runs_the_model_on_the_stored_bytes(model, monkeypatch):
    """Every layer, on the input that it has in the model, equals the definition; every one was our kernel's call."""
    monkeypatch.setattr(Attention, "forward", attention)
    seen = {}
    for name, layer in quantized(model).items():
        layer.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (m, args[0], out[0])}))
    calls = sum(observe.calls.values())
    with torch.inference_mode():
        logits = model.compute_logits(model(TOKENS, torch.arange(len(TOKENS)), None))
    assert logits.shape == (len(TOKENS), 300)
    assert logits.isfinite().all()
    assert sum(observe.calls.values()) == calls + len(seen) == calls + 8
    for name, (layer, x, y) in seen.items():
        weight = BlockScaled(layer.weight.data, layer.weight_scale_inv.data, get_format("fp8_128x128"))
        want = reference.linear(x, weight, numerics=NUMERICS)
        torch.testing.assert_close(y, want, rtol=2.0**-7, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
