"""Device "xpu" without one: shapes, dtypes and devices of every adapter through FakeTensorMode.

A fake tensor of another device in the same operation raises, so each passing call shows that the code made all its
tensors on the device that it was given.
"""

from pathlib import Path

import pytest
import torch

import blockscale
from blockscale import fakes, layouts, reference
from blockscale.formats import get_format
from blockscale.kernels.xpu import KERNELS
from blockscale.numerics import get_numerics
from blockscale.platform import Platform
from blockscale.registry import Problem
from blockscale.tensor import BlockScaled
from intel import standin
from intel.fake_xpu import fake_xpu

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


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("name", "format", "numerics", "n", "k"), LINEARS)
def test_linear_adapters_stay_on_their_device_and_dtype(fake, name, format, numerics, n, k, dtype):
    kernel = adapter(name, "linear")
    problem = Problem("linear", n, k, dtype, get_format(format), kernel.layout, dtype, get_numerics(numerics))
    assert list(kernel.why_not(problem, BMG)) == []
    x = torch.empty(7, 2 * k, dtype=dtype, device="xpu")[:, :k]
    y = kernel.run(problem, x, weight(n, k, format, layout=kernel.layout), torch.empty(n, dtype=dtype, device="xpu"))
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("xpu", dtype, (7, n))


GROUPED = [
    ("xpu.fp8_bmm", "fp8_128x128", "checkpoint"),
    ("xpu.fp8_bmm", "fp8_128x128_ue8m0", "deepseek_v4"),
    ("xpu.grouped_gemm", "fp8_128x128_ue8m0", "weight_only"),
    ("xpu.grouped_gemm_mxfp4", "mxfp4", "weight_only"),
]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("name", "format", "numerics"), GROUPED)
def test_grouped_adapters_stay_on_their_device_and_dtype(fake, name, format, numerics, dtype):
    kernel = adapter(name, "grouped_linear")
    fmt = get_format(format)
    problem = Problem("grouped_linear", 256, 384, dtype, fmt, kernel.layout, dtype, get_numerics(numerics), 8)
    assert list(kernel.why_not(problem, BMG)) == []
    x, ends = torch.empty(24, 384, dtype=dtype, device="xpu"), torch.empty(8, dtype=torch.int32, device="xpu")
    y = kernel.run(problem, x, weight(256, 384, format, (8,), kernel.layout), ends)
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("xpu", dtype, (24, 256))


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
    data, scale, _ = fakes.quantize(x, None, format, layout, "", 0.0, "")
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


def test_a_tensor_of_another_device_would_be_noticed(fake):
    with pytest.raises(Exception, match="device"):
        torch.empty(3, device="xpu") + torch.empty(3, device="cuda")
