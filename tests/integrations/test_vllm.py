"""The vLLM plugin against vLLM's interface as `tests/vllm/contract.py` states it. The real code: `make test-vllm`."""

import importlib
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import blockscale
from blockscale import BlockscaleError, NoKernelError, observe, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "vllm"))
import contract

sys.path.pop(0)


@pytest.fixture
def plugin(monkeypatch):
    for name, module in contract.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "blockscale.integrations.vllm", raising=False)
    yield importlib.import_module("blockscale.integrations.vllm")
    sys.modules.pop("blockscale.integrations.vllm", None)


def layer_of(weight, name="weight_scale_inv"):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.data, requires_grad=False)
    setattr(layer, name, torch.nn.Parameter(weight.scale, requires_grad=False))
    return layer


def test_vllm_finds_it_by_its_entry_point():
    ours = [e for e in metadata.entry_points(group="vllm.general_plugins") if e.name == "blockscale"]
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'blockscale = "blockscale.integrations.vllm:register"' in pyproject
    assert [e.value for e in ours] in ([], ["blockscale.integrations.vllm:register"])  # [] before a reinstall


@pytest.mark.parametrize(("where", "at"), [(None, -1), ("last", -1), ("first", 0)])
def test_it_registers_once_for_every_platform(plugin, monkeypatch, where, at):
    if where:
        monkeypatch.setenv("BLOCKSCALE_VLLM", where)
    plugin.register()
    plugin.register()
    for platform in ("CUDA", "ROCM", "XPU", "CPU"):
        kernels = contract.lists()[contract.PlatformEnum[platform]]
        assert kernels[at] is plugin.BlockscaleFp8BlockLinearKernel
        assert kernels.count(plugin.BlockscaleFp8BlockLinearKernel) == 1


def test_it_can_be_turned_off(plugin, monkeypatch):
    monkeypatch.setenv("BLOCKSCALE_VLLM", "off")
    plugin.register()
    assert contract.lists()[contract.PlatformEnum.CPU] == [object]
    monkeypatch.setenv("BLOCKSCALE_VLLM", "second")
    with pytest.raises(BlockscaleError, match="got 'second', need first, last or off"):
        plugin.register()


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("form", ["fp8_128x128", "fp8_128x128_ue8m0", "fp8_32x32_ue8m0"])
def test_a_layer_is_served_as_the_definition_says(plugin, name, form):
    block = blockscale.get_format(form).block
    kernel_class = plugin.BlockscaleFp8BlockLinearKernel
    config = contract.config(192, 576, block=block)
    assert kernel_class.is_supported(None) == (True, None)
    assert kernel_class.can_implement(config) == (True, None)
    weight = blockscale.quantize(torch.randn(192, 576), form)
    kernel, layer = kernel_class(config), layer_of(weight, name)
    kernel.process_weights_after_loading(layer)
    x, bias = torch.randn(2, 5, 576, dtype=torch.bfloat16), torch.randn(192, dtype=torch.bfloat16)
    calls = sum(observe.calls.values())
    y = kernel.apply_weights(layer, x, bias)
    assert sum(observe.calls.values()) == calls + 1
    numerics = blockscale.get_numerics(f"checkpoint,act_group={block[1]},act_rounding=none")
    want = reference.linear(x, weight, bias, numerics=numerics)
    torch.testing.assert_close(y, want, rtol=2.0**-7, atol=1e-3)
    assert y.shape == (2, 5, 192)
    quantized = blockscale.quantize(x.flatten(0, 1), f"fp8_1x{block[1]}")
    product = kernel.apply_block_scaled_mm(quantized.data, weight.data, quantized.scale, weight.scale)
    torch.testing.assert_close(product, reference.matmul(quantized, weight, torch.bfloat16), rtol=2.0**-7, atol=1e-3)
    assert layer.weight.data_ptr() == weight.data.data_ptr()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"static": True}, "activation scales are static"),
        ({"block": (-1, -1)}, "weight blocks are -1x-1"),
        ({"out_dtype": torch.float32}, "x is torch.bfloat16 and the result torch.float32"),
        ({"element": torch.int8}, "weights are torch.int8"),
        ({"dtype": torch.float64}, "cpu.slices: x is torch.float64"),
    ],
)
def test_what_it_refuses_it_says(plugin, changes, why):
    accepted, reason = plugin.BlockscaleFp8BlockLinearKernel.can_implement(contract.config(192, 576, **changes))
    assert not accepted
    assert why in reason


def test_it_does_not_serve_with_the_reference_alone(plugin, monkeypatch):
    monkeypatch.setattr(plugin, "_platform", lambda: blockscale.Platform.parse("npu:x"))
    accepted, reason = plugin.BlockscaleFp8BlockLinearKernel.can_implement(contract.config(192, 576))
    assert not accepted
    assert "cpu.slices: runs on cpu, not on npu" in reason
    assert "reference" not in reason


def test_a_device_that_is_not_there(plugin, monkeypatch):
    monkeypatch.setattr(contract.CurrentPlatform, "device_type", "xpu")
    supported, reason = plugin.BlockscaleFp8BlockLinearKernel.is_supported(None)
    assert not supported
    assert "finds none on this machine" in reason


def test_an_order_from_outside_is_obeyed_here_too(plugin, monkeypatch):
    monkeypatch.setenv("BLOCKSCALE_KERNEL", "linear=gluon.decode")
    kernel = plugin.BlockscaleFp8BlockLinearKernel(contract.config(192, 576))
    with pytest.raises(NoKernelError, match="gluon.decode: uses wgmma"):
        kernel.process_weights_after_loading(layer_of(blockscale.quantize(torch.randn(192, 576), "fp8_128x128")))
