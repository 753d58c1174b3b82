"""Every op under torch.compile, export and the modes that people run models in."""

import pytest
import torch
import torch._dynamo.testing

import blockscale
from blockscale.nn import Experts, Linear, StackedLinear

OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)


def weight(*lead, format="fp8_128x128"):
    return blockscale.quantize(torch.randn(*lead, 192, 256), format)


def quantized(q):
    return q.data.view(torch.uint8), q.scale.view(torch.uint8)


def calls(name):
    """One op with its constant operands bound: a function of x `[M, 256]`."""
    fp8, mxfp4, experts = weight(), weight(format="mxfp4"), StackedLinear(weight(3))
    dense, gain = torch.randn(64, 256), torch.rand(256)
    return {
        "linear": lambda x: blockscale.linear(x, fp8),
        "linear weight_only": lambda x: blockscale.linear(x, mxfp4, numerics="weight_only"),
        "module": Linear(fp8, torch.randn(192)),
        "grouped_linear": lambda x: experts(x, OFFSETS.clamp(max=x.shape[0])),
        "matmul": lambda x: blockscale.matmul(blockscale.quantize(x, "fp8_1x128"), fp8, torch.float32),
        "dense_linear": lambda x: blockscale.dense_linear(x, dense),
        "quantize": lambda x: quantized(blockscale.quantize(x, "fp8_1x128")),
        "quantize tma": lambda x: quantized(blockscale.quantize(x, "fp8_1x128", layout="tma")),
        "swiglu_quantize": lambda x: quantized(blockscale.swiglu_quantize(x, "fp8_1x128", limit=2.0)),
        "rmsnorm_quantize": lambda x: quantized(blockscale.rmsnorm_quantize(x, gain, 1e-6, "fp8_1x128")),
    }[name]


NAMES = (
    "linear", "linear weight_only", "module", "grouped_linear", "matmul", "dense_linear", "quantize", "quantize tma",
    "swiglu_quantize", "rmsnorm_quantize",
)  # fmt: skip


def same(a, b):
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_every_batch(name):
    """fullgraph, and at most one compilation beyond the first for any number of rows."""
    torch._dynamo.reset()
    run, compiled = calls(name), torch._dynamo.testing.CompileCounter()
    fast = torch.compile(run, fullgraph=True, backend=compiled)
    for rows in (5, 7, 12, 33, 6):
        x = torch.randn(rows, 256)
        assert same(fast(x), run(x))
    assert compiled.frame_count <= 2


@pytest.mark.parametrize("name", ["module", "quantize tma"])
def test_through_inductor(name):
    torch._dynamo.reset()
    run = calls(name)
    fast = torch.compile(run, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        x = torch.randn(rows, 256)
        assert same(fast(x), run(x))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (
            Linear(weight(), torch.randn(192)),
            Linear(blockscale.quantize(torch.randn(256, 192), "fp8_128x128")),
        )

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def test_exported_it_keeps_the_ops_and_the_bytes():
    model, x = Model(), torch.randn(3, 256)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", max=64)}})
    calls = [n.target for n in program.graph.nodes if "blockscale" in str(n.target)]
    assert len(calls) == 2
    for rows in (3, 8):
        x = torch.randn(rows, 256)
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # torch 2.13's own
def test_ahead_of_time_compiled(tmp_path):
    """AOTInductor: a package that needs Python only for our ops."""
    model, x = Model(), torch.randn(3, 256)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", max=64)}})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for rows in (3, 8):
        x = torch.randn(rows, 256)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_inference_mode_gives_the_same_and_its_results_are_usable():
    model, x = Model(), torch.randn(3, 256)
    with torch.inference_mode():
        y = model(x)
        q = blockscale.quantize(x, "fp8_1x128")
    assert torch.equal(y, model(x))
    assert torch.equal(blockscale.dequantize(q), blockscale.dequantize(blockscale.quantize(x, "fp8_1x128")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_neither_bytes_nor_the_dtype_of_the_result(dtype):
    """An op computes in the dtype of x, as it says: autocast casts only what torch's own layers make around it."""
    layer, x = Linear(weight()), torch.randn(3, 256)
    plain = torch.nn.Linear(256, 256)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer(x), layer(x))
        y = layer(x)
        after = layer(plain(x))
    assert y.dtype == torch.float32
    assert torch.equal(y, layer(x))
    assert after.dtype == dtype


def test_adapters_on_experts_learn_beside_frozen_weights():
    """Gradients reach what lies before the experts, through their stored bytes and the routing weights."""
    experts = Experts(blockscale.quantize(torch.randn(4, 128, 64) / 8, "fp8_32x32_ue8m0"),
                      blockscale.quantize(torch.randn(4, 64, 64) / 8, "fp8_32x32_ue8m0"))  # fmt: skip
    before = {name: b.view(torch.uint8).clone() for name, b in experts.named_buffers()}
    first, router = torch.nn.Linear(64, 64), torch.nn.Linear(64, 4)
    optimizer = torch.optim.Adam([*first.parameters(), *router.parameters()], lr=1e-2)
    x, target = torch.randn(32, 64), torch.randn(32, 64)
    losses = []
    for _ in range(15):
        weights, index = router(x).softmax(-1).topk(2)
        loss = (experts(first(x), index, weights) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in (*first.parameters(), *router.parameters()))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], b.view(torch.uint8)) for name, b in experts.named_buffers())


def test_op_results_never_share_memory_with_a_given_scale():
    x = torch.randn(3, 256)
    scale = blockscale.quantize(x, "fp8_1x128").scale
    for kernel in ("reference", None):
        q = blockscale.quantize(x, "fp8_1x128", scale=scale, kernel=kernel)
        assert q.scale.data_ptr() != scale.data_ptr()
        assert torch.equal(q.scale, scale)
