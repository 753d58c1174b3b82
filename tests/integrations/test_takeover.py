"""`enable`, `enabled` and `load`: who has transformers' mappings, for how long, and that they are given back."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import blockscale
from blockscale.errors import BlockscaleError
from blockscale.integrations import transformers as integration
from blockscale.integrations.transformers import quantizer, takeover


def test_enable_takes_over_from_pretrained_and_disable_gives_it_back(ragged):
    stock = dict(auto.AUTO_QUANTIZER_MAPPING)
    integration.enable()
    try:
        model = AutoModelForCausalLM.from_pretrained(ragged, dtype=torch.bfloat16)
        assert isinstance(model.model.layers[0].mlp.down_proj, blockscale.nn.Linear)
    finally:
        integration.disable()
    assert stock == auto.AUTO_QUANTIZER_MAPPING


def test_enabled_holds_within_the_block_and_in_this_thread_only(ragged):
    stock = dict(auto.AUTO_QUANTIZER_MAPPING)
    policies = {}

    def from_pretrained(who):
        policies[who] = AutoModelForCausalLM.from_pretrained(ragged).blockscale_policy.name

    with integration.enabled("hf"):
        from_pretrained("inside")
        with integration.enabled("vllm"):
            from_pretrained("nested")
        from_pretrained("inside again")
        other = threading.Thread(target=from_pretrained, args=("another thread",))
        other.start()
        other.join()
    assert policies == {"inside": "hf", "nested": "vllm", "inside again": "hf", "another thread": "reference"}
    assert stock == auto.AUTO_QUANTIZER_MAPPING


def test_holders_may_end_in_any_order():
    stock = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    first, second = takeover.taken(("fp8", "mxfp8")), takeover.taken(("fp8",))
    integration.enable()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    integration.disable()
    integration.disable()
    assert auto.AUTO_QUANTIZER_MAPPING["fp8"] is quantizer.BlockscaleQuantizer
    second.__exit__(None, None, None)
    assert stock == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)


def test_load_leaves_stock_behaviour_alone(ragged):
    stock = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    integration.load(ragged)
    assert stock == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)


def test_another_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(quantizer.transformers, "__version__", "5.24.1")
    with pytest.raises(BlockscaleError, match=r"works with transformers 5\.23\.x, got 5\.24\.1"):
        integration.enable()
