"""Device "xpu" without one: shapes, dtypes and devices through FakeTensorMode, and nothing tied to another vendor.

A fake tensor of another device in the same operation raises, so each passing call shows that the code made all its
tensors on the device that it was given.
"""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import blockscale
from blockscale import layouts, library, nn, reference
from blockscale.formats import get_format
from blockscale.kernels.xpu import KERNELS
from blockscale.numerics import get_numerics
from blockscale.platform import Platform
from blockscale.registry import Problem
from blockscale.tensor import BlockScaled


def beside(name):
    """A module of this folder, once a process: ops can be registered only once."""
    key = f"tests_kernels_xpu_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, Path(__file__).with_name(f"{name}.py"))
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


standin, fake_xpu = beside("standin"), beside("fake_xpu").fake_xpu

BF16 = torch.bfloat16
BMG = Platform.parse("xpu:bmg+triton+vllm-xpu-kernels=0.1.16")
SOURCES = sorted(Path(blockscale.__file__).parent.rglob("*.py"))


@pytest.fixture(scope="module")
def _package():
    standin.install()
    standin.install_fakes()


@pytest.fixture
def fake(_package):
    with fake_xpu() as mode:
        yield mode


def weight(n, k, format="fp8_128x128", experts=(), layout="row", device="xpu"):
    fmt = get_format(format)
    data = torch.empty(*experts, *fmt.data_shape(n, k), dtype=fmt.element.dtype, device=device)
    scale = torch.empty(*experts, *fmt.scale_shape(n, k), dtype=fmt.scale_dtype, device=device)
    return layouts.convert(BlockScaled(data, scale, fmt, shape=(*experts, n, k)), layout)


def adapter(name, op):
    return next(k for k in KERNELS if (k.name, k.op) == (name, op))


LINEARS = [
    ("xpu.fp8_gemm", "fp8_128x128", "checkpoint", 576, 512),
    ("xpu.fp8_gemm", "fp8_128x128", "checkpoint", 129, 128),
    ("xpu.fp8_gemm", "fp8_128x128_ue8m0", "deepseek_v4", 256, 256),
    ("xpu.fp8_gemm", "fp8_row", "checkpoint", 256, 256),
    ("xpu.fp8_gemm", "fp8_tensor", "checkpoint", 256, 256),
    ("xpu.fp8_gemm_w8a16", "fp8_128x128_ue8m0", "weight_only", 192, 576),
]


@pytest.mark.parametrize(("name", "format", "numerics", "n", "k"), LINEARS)
def test_linear_adapters_stay_on_their_device(fake, name, format, numerics, n, k):
    kernel = adapter(name, "linear")
    problem = Problem("linear", n, k, BF16, get_format(format), kernel.layout, BF16, get_numerics(numerics))
    assert list(kernel.why_not(problem, BMG)) == []
    x = torch.empty(7, 2 * k, dtype=BF16, device="xpu")[:, :k]
    y = kernel.run(problem, x, weight(n, k, format, layout=kernel.layout), torch.empty(n, dtype=BF16, device="xpu"))
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("xpu", BF16, (7, n))


GROUPED = [
    ("xpu.fp8_bmm", "fp8_128x128", "checkpoint"),
    ("xpu.fp8_bmm", "fp8_128x128_ue8m0", "deepseek_v4"),
    ("xpu.grouped_gemm", "fp8_128x128_ue8m0", "weight_only"),
    ("xpu.grouped_gemm_mxfp4", "mxfp4", "weight_only"),
]


@pytest.mark.parametrize(("name", "format", "numerics"), GROUPED)
def test_grouped_adapters_stay_on_their_device(fake, name, format, numerics):
    kernel = adapter(name, "grouped_linear")
    fmt = get_format(format)
    problem = Problem("grouped_linear", 256, 384, BF16, fmt, kernel.layout, BF16, get_numerics(numerics), 8)
    assert list(kernel.why_not(problem, BMG)) == []
    x, ends = torch.empty(24, 384, dtype=BF16, device="xpu"), torch.empty(8, dtype=torch.int32, device="xpu")
    y = kernel.run(problem, x, weight(256, 384, format, (8,), kernel.layout), ends)
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("xpu", BF16, (24, 256))


QUANTIZERS = [
    ("xpu.group_quantize", "fp8_1x128", "tma"),
    ("xpu.group_quantize", "fp8_1x128_ue8m0", "col_scales"),
    ("xpu.row_quantize", "fp8_row", "row"),
    ("xpu.static_quantize", "fp8_tensor", "row"),
]


@pytest.mark.parametrize(("name", "format", "layout"), QUANTIZERS)
def test_quantizers_stay_on_their_device_and_give_the_declared_shapes(fake, name, format, layout):
    kernel, fmt = adapter(name, "quantize"), get_format(format)
    problem = Problem("quantize", 0, 384, BF16, fmt, layout, BF16)
    assert list(kernel.why_not(problem, BMG)) == []
    x = torch.empty(7, 384, dtype=BF16, device="xpu")
    q = kernel.run(problem, x, None, 1e-10)
    data, scale, _ = library._fake_parts(x, 384, format, layout)
    for got, want in ((q.data, data), (q.scale, scale)):
        assert (got.device.type, got.dtype, got.shape) == ("xpu", want.dtype, want.shape)


def test_swiglu_stays_on_its_device(fake):
    kernel = adapter("xpu.swiglu_quantize", "swiglu_quantize")
    problem = Problem("swiglu_quantize", 0, 256, BF16, get_format("fp8_1x128_ue8m0"), "col_scales", BF16)
    gate_up, routing = torch.empty(5, 512, dtype=BF16, device="xpu"), torch.empty(5, device="xpu")
    q = kernel.run(problem, gate_up, 7.0, routing, 1e-10)
    assert (q.data.device.type, tuple(q.data.shape), tuple(q.scale.shape)) == ("xpu", (5, 256), (2, 5))


def test_public_ops_dispatch_on_xpu(fake):
    x = torch.empty(2, 3, 256, dtype=BF16, device="xpu")
    y = blockscale.linear(x, weight(576, 256))
    assert (y.device.type, tuple(y.shape)) == ("xpu", (2, 3, 576))
    q = blockscale.quantize(x, "fp8_1x128")
    assert (q.device.type, tuple(q.scale.shape)) == ("xpu", (2, 3, 2))


def test_the_reference_stays_on_its_device(fake):
    x, w = torch.empty(5, 256, dtype=BF16, device="xpu"), weight(192, 256)
    y = reference.linear(x, w, numerics=get_numerics("checkpoint"), compute=torch.float32)
    assert (y.device.type, tuple(y.shape)) == ("xpu", (5, 192))
    assert reference.dequantize(weight(64, 64, "mxfp4")).device.type == "xpu"


def swap_linears(module):
    """Every nn.Linear as our FP8 module, as the integrations do it."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear) and name != "lm_head":
            fp8 = nn.Linear.empty(child.out_features, child.in_features, "fp8_128x128", device=child.weight.device)
            setattr(module, name, fp8)
        else:
            swap_linears(child)


def move(model):
    """`model.to("xpu")`, where torch swaps parameters in place and cannot do so with fake ones."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to("xpu").half().to(BF16)
            continue
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                new = None if t is None else t.detach().to("xpu")
                held[name] = torch.nn.Parameter(new, False) if isinstance(t, torch.nn.Parameter) else new


def test_a_whole_transformers_model_moves_to_xpu_and_runs(fake):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=BF16)
    swap_linears(model)
    bytes_before = {n: b.dtype for n, b in model.named_buffers() if n.endswith("proj.weight")}
    move(model)
    assert len(bytes_before) == 14
    assert {n: b.dtype for n, b in model.named_buffers() if n in bytes_before} == bytes_before
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"xpu"}
    logits = model(torch.zeros(2, 5, dtype=torch.long, device="xpu"), use_cache=False).logits
    assert (logits.device.type, tuple(logits.shape), logits.dtype) == ("xpu", (2, 5, 128), BF16)
    layer = model.model.layers[0].mlp.down_proj
    assert "xpu.fp8_gemm" not in str(layer.plan(platform=BMG))  # K = 704 is ragged
    assert str(model.model.layers[0].self_attn.k_proj.plan(platform=BMG, repack=True)) == "M 1..: xpu.fp8_gemm"


# -- nothing tied to a vendor ------------------------------------------------------------------------------------

VENDOR = {"cuda", "xpu", "hip"}
VENDOR_FOLDERS = {"gluon", "deep_gemm", "aiter"}
"""Kernels for one vendor's chips; they refuse every other kind."""


def vendor_calls(text):
    """Lines that use torch.cuda, torch.xpu or a device by a vendor's name."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            named = node.value.id == "torch" and node.attr in VENDOR
        elif isinstance(node, ast.Call):
            words = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
            on_device = isinstance(node.func, ast.Attribute) and node.func.attr in {"to", "device", "cuda", "autocast"}
            keyed = any(k.arg == "device" and isinstance(k.value, ast.Constant) for k in node.keywords)
            named = (on_device or keyed) and any(str(w).split(":")[0] in VENDOR for w in words)
        else:
            named = False
        if named:
            found.append(node.lineno)
    return found


def test_no_code_of_ours_names_a_vendor_s_device_or_stream():
    root = Path(blockscale.__file__).parent
    wrong = {}
    for path in SOURCES:
        parts = path.relative_to(root).parts
        if parts[0] == "platform.py" or (parts[0] == "kernels" and parts[1] in VENDOR_FOLDERS):
            continue
        if lines := vendor_calls(path.read_text()):
            wrong[str(path)] = lines
    assert wrong == {}


@pytest.mark.parametrize(
    "text", ["torch.cuda.current_stream()", "x.to('cuda')", "torch.empty(3, device='xpu:0')", "torch.device('cuda:1')"]
)
def test_the_search_finds_them(text):
    assert vendor_calls(text) == [1]


def test_a_tensor_of_another_device_would_be_noticed(fake):
    with pytest.raises(Exception, match="device"):
        torch.empty(3, device="xpu") + torch.empty(3, device="cuda")
