"""Whole transformers models on a fake XPU, kernels included: no tensor leaves the device that the model is on.

Checkpoints are loaded as users load them. Then weights are packed for a described platform, everything becomes a
fake tensor on "xpu", and a forward pass runs the kernels that the registry chose: the adapters over the package's ops
(their shapes and devices; `test_contract.py` has their numbers), Triton's launchers up to the launch, and the
reference. A tensor made on another device, or cast to a dtype that a kernel did not ask for, raises.
"""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from blockscale import layouts, library, registry
from blockscale.checkpoint import quantize_checkpoint
from blockscale.integrations import transformers as integration
from blockscale.kernels.triton import gemm, grouped, operands, quantize
from blockscale.nn.linear import WeightModule
from blockscale.observe import calls
from blockscale.platform import Platform
from intel import fake_xpu, standin
from makers import make_deepseek_v3, make_deepseek_v4, make_llama, make_qwen3_moe

PACKAGE = "xpu:bmg+triton=3.6+torch=2.13+vllm-xpu-kernels=0.1.16.2"
TRITON = "xpu:pvc+triton=3.6+torch=2.13"
BARE = "xpu:dg2+torch=2.13"


@pytest.fixture(scope="module", autouse=True)
def _package():
    standin.install()
    standin.install_fakes()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "bf16", tied=True)
    quantize_checkpoint(folder / "bf16", folder / "llama", "fp8_128x128")
    make_deepseek_v3(folder / "deepseek_v3")
    make_deepseek_v4(folder / "deepseek_v4")
    make_qwen3_moe(folder / "qwen3_moe")
    return folder


class Kernels(TorchDispatchMode):
    """Our ops by the kernels that were chosen, instead of by their shapes alone."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "blockscale":
            return func(*args, **(kwargs or {}))
        with fake_xpu.Rewrite():
            return library.IMPLEMENTATIONS[func._schema.name.split("::")[1]](*args, **(kwargs or {}))


@contextmanager
def described(text, monkeypatch, launches):
    """Code under it believes to be on that platform; Triton's launches are counted, and checked for their device."""
    platform = Platform.parse(text)

    def launch(self, *args, grid, warmup, **kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        assert {t.device.type for t in tensors} == {"xpu"}, f"{self.__name__} on {[t.device for t in tensors]}"
        launches[self.__name__] += 1

    asking = [m for name, m in sys.modules.items() if name.startswith("blockscale.") and hasattr(m, "detect")]
    with monkeypatch.context() as patch:
        for module in asking:
            patch.setattr(module, "detect", lambda device: platform)
        for module in (gemm, grouped, operands, quantize):
            patch.setattr(module, "on_device", lambda tensor: nullcontext())
        patch.setattr(JITFunction, "run", launch)
        forget()
        yield platform
    forget()


def forget():
    """Choices that are memoised by device, which is another one now."""
    for callback in registry.on_change:
        callback()


def move(model):
    """`model.to("xpu")`, where torch swaps parameters in place and cannot do so with fake ones."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                new = None if t is None else torch.empty(t.shape, dtype=t.dtype, device="xpu")
                held[name] = torch.nn.Parameter(new, False) if isinstance(t, torch.nn.Parameter) else new


BF16, F16 = torch.bfloat16, torch.float16
RUNS = [
    ("llama", PACKAGE, BF16, {"xpu.fp8_gemm": 12, "triton.block": 2}),  # down_proj has K = 192
    ("llama", TRITON, F16, {"triton.block": 14}),
    ("llama", BARE, F16, {"reference.linear": 14}),
    ("deepseek_v3", PACKAGE, F16, {"xpu.fp8_gemm": 16, "xpu.fp8_bmm": 2}),
    ("deepseek_v3", TRITON, BF16, {"triton.block": 18}),
    ("deepseek_v4", PACKAGE, BF16, {"xpu.fp8_gemm": 30, "xpu.grouped_gemm": 4, "triton.block": 8}),
    ("deepseek_v4", TRITON, BF16, {"triton.block": 42}),
    ("qwen3_moe", PACKAGE, BF16, {"xpu.fp8_gemm": 8, "xpu.fp8_bmm": 4}),
]
"""Checkpoint, platform, dtype of the activations, calls of each kernel. The reference's experts look at offsets on the
host, which fake tensors have not."""


@pytest.mark.parametrize(("name", "platform", "dtype", "want"), RUNS, ids=[f"{r[0]}-{r[1][:7]}" for r in RUNS])
def test_a_whole_model_moves_to_xpu_and_runs(name, platform, dtype, want, checkpoints, monkeypatch):
    model = integration.load(checkpoints / name, dtype=dtype)
    model.config._attn_implementation = "eager"
    launches: Counter[str] = Counter()
    with described(platform, monkeypatch, launches) as there:
        for module in model.modules():
            if isinstance(module, WeightModule):
                layout = module.plan(dtype, there, repack=True).layout
                module._hold(layouts.convert(module.quantized, layout))
        stored = {n: b.dtype for n, b in model.named_buffers() if b is not None}
        calls.clear()
        with fake_xpu.fake_xpu():
            move(model)
            with Kernels():
                logits = model(torch.zeros(2, 5, dtype=torch.long, device="xpu"), use_cache=False).logits
    assert (logits.device.type, tuple(logits.shape[:2]), logits.dtype) == ("xpu", (2, 5), dtype)
    assert {n: b.dtype for n, b in model.named_buffers() if b is not None} == stored
    ran = {n: count for n, count in calls.items() if n != "reference.dense_linear"}
    assert ran == want
    assert bool(launches) == ("triton.block" in want)


def test_a_tensor_on_another_device_would_be_noticed(checkpoints, monkeypatch):
    model = integration.load(checkpoints / "llama")
    with described(BARE, monkeypatch, Counter()), fake_xpu.fake_xpu():
        move(model)
        strayed = model.model.layers[1].mlp.down_proj
        strayed._buffers["weight_scale_inv"] = strayed.quantized.scale.to("cpu")
        with Kernels(), pytest.raises(Exception, match="device"):
            model(torch.zeros(2, 5, dtype=torch.long, device="xpu"), use_cache=False)
