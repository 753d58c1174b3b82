"""Run inside a Python that has vLLM 0.33 (see run.py): its own code, asked, loaded and called with our kernel in it.

Executed for real: vLLM's plugin loader over our entry point, `register_linear_kernel`, `init_fp8_linear_kernel` and
what it chooses, `Fp8LinearMethod` (create_weights, process_weights_after_loading, apply; not its `__init__`), its
QuantKey and GroupShape. Not executed: an engine, model loading, a GPU.
"""

import inspect
import os

os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # a CUDA wheel on a machine without a GPU
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, create_fp8_quant_key
from vllm.platforms import PlatformEnum, current_platform
from vllm.plugins import load_general_plugins

import blockscale
import vllm
from blockscale import observe, reference

OURS = "BlockscaleFp8BlockLinearKernel"


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory):
    """vLLM finds and calls our entry point by itself; its groups exist, of one process."""
    load_general_plugins()
    meeting = tmp_path_factory.mktemp("groups") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel()
        yield


def ours(platform):
    return [k.__name__ for k in kernels._POSSIBLE_FP8_BLOCK_KERNELS[platform]]


def test_versions():
    assert vllm.__version__.startswith("0.33.")
    assert current_platform._enum is PlatformEnum.CPU


def test_the_plugin_is_last_in_every_list_and_only_once():
    from blockscale.integrations.vllm import register

    register()
    for platform in (PlatformEnum.CUDA, PlatformEnum.ROCM, PlatformEnum.XPU, PlatformEnum.CPU):
        assert ours(platform)[-1] == OURS
        assert ours(platform).count(OURS) == 1
        assert len(ours(platform)) > 2


def chosen(n, k, dtype=torch.bfloat16, block=(128, 128)):
    return kernels.init_fp8_linear_kernel(
        activation_quant_key=create_fp8_quant_key(static=False, group_shape=GroupShape(1, block[1])),
        weight_quant_key=create_fp8_quant_key(static=True, group_shape=GroupShape(*block)),
        input_dtype=dtype, out_dtype=dtype, weight_shape=(n, k), module_name="test",
    )  # fmt: skip


def test_vllm_selects_it_where_its_own_refuse_and_logs_that(caplog_vllm):
    """Without AMX vLLM's CPU kernels refuse: ours serves, and vLLM says so."""
    assert type(chosen(192, 576)).__name__ == OURS
    assert f"Selected {OURS} for test" in caplog_vllm.text


@pytest.fixture
def caplog_vllm(caplog):
    """vLLM's loggers do not propagate, and say each line once a process."""
    import logging

    from vllm import logger as vllm_logger

    for name in dir(vllm_logger):
        value = getattr(vllm_logger, name)
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    root = logging.getLogger("vllm")
    root.addHandler(caplog.handler)
    root.setLevel(logging.INFO)  # what VLLM_LOGGING_LEVEL is by default
    yield caplog
    root.removeHandler(caplog.handler)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("e8m0", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_loaded_and_called_by_vllm_s_own_code(caplog_vllm, dtype, e8m0, bias):
    n, k = 192, 576  # ragged against 128 both ways
    weight = blockscale.quantize(torch.randn(n, k), "fp8_128x128_ue8m0" if e8m0 else "fp8_128x128")
    method = method_for(dtype, e8m0)
    layer = torch.nn.Module()
    method.create_weights(layer, k, [n], k, n, dtype, weight_loader=lambda *a: None)
    layer.weight.data.copy_(weight.data)
    layer.weight_scale_inv.data.copy_(weight.scale)
    before = layer.weight.view(torch.uint8).clone()
    method.process_weights_after_loading(layer)
    assert type(method.fp8_linear).__name__ == OURS
    assert "served by" in caplog_vllm.text
    x, b = torch.randn(2, 5, k, dtype=dtype), torch.randn(n, dtype=dtype) if bias else None
    calls = sum(observe.calls.values())
    y = method.apply(layer, x, b)
    assert sum(observe.calls.values()) == calls + 1
    want = reference.linear(
        x, weight, b, numerics=blockscale.get_numerics("checkpoint,act_group=128,act_rounding=none")
    )
    torch.testing.assert_close(y, want, rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    assert torch.equal(layer.weight.view(torch.uint8), before)


def method_for(dtype, e8m0):
    config = Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128])
    config.is_scale_e8m0 = e8m0
    method = Fp8LinearMethod.__new__(Fp8LinearMethod)  # its __init__ wants an engine's model_config for one dtype
    method.quant_config, method.is_scale_e8m0, method.out_dtype, method.input_dtype = config, e8m0, dtype, dtype
    method.marlin_input_dtype, method.use_marlin, method.use_deep_gemm = None, False, False
    method.weight_block_size, method.block_quant, method.act_q_static = [128, 128], True, False
    method.activation_quant_key = create_fp8_quant_key(static=False, group_shape=GroupShape(1, 128))
    method.weight_quant_key = create_fp8_quant_key(static=True, group_shape=GroupShape(128, 128))
    return method


def test_refusals_reach_vllm_s_error():
    kernel = type(chosen(192, 576))
    config = chosen(192, 576).config
    config.activation_quant_key = create_fp8_quant_key(static=True, group_shape=GroupShape(1, 128))
    assert kernel.can_implement(config) == (False, "activation scales are static, needs dynamic ones")


def test_compiled_by_torch_it_is_one_op():
    weight = blockscale.quantize(torch.randn(64, 256), "fp8_128x128")
    kernel = chosen(64, 256, torch.float32)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.data, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(weight.scale, requires_grad=False)
    kernel.process_weights_after_loading(layer)
    x = torch.randn(3, 256)
    run = torch.compile(lambda x: kernel.apply_weights(layer, x), fullgraph=True)
    torch.testing.assert_close(run(x), kernel.apply_weights(layer, x))


def test_the_contract_of_make_test_is_vllm_s():
    """Every signature and name that tests/vllm/contract.py states."""
    import contract

    def parameters(function):
        return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]

    ours_base, base = contract.Fp8BlockScaledMMLinearKernel, kernels.Fp8BlockScaledMMLinearKernel
    for name in (
        "is_supported",
        "can_implement",
        "process_weights_after_loading",
        "apply_weights",
        "apply_block_scaled_mm",
    ):
        assert parameters(getattr(ours_base, name)) == parameters(getattr(base, name)), name
    assert parameters(contract.register_linear_kernel) == parameters(kernels.register_linear_kernel)
    config = chosen(192, 576).config
    for field in contract.Config.__dataclass_fields__:
        assert hasattr(config, field)
    assert config.weight_quant_key.scale.group_shape == contract.config(192, 576).weight_quant_key.scale.group_shape
    assert config.activation_quant_key.scale.static is False
    assert {p.name for p in contract.PlatformEnum} == {p.name for p in PlatformEnum}
