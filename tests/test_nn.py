import copy

import pytest
import torch

import blockscale
from blockscale import DtypeError, ShapeError
from blockscale.nn import BlockDiagonalLinear, DenseLinear, Experts, Linear, Names, StackedLinear


@pytest.fixture
def model():
    return torch.nn.Sequential(
        Linear(blockscale.quantize(torch.randn(192, 576), "fp8_128x128"), torch.randn(192)),
        torch.nn.SiLU(),
        Linear(blockscale.quantize(torch.randn(64, 192), "fp8_128x128_ue8m0")),
    )


def stored(model):
    return {k: v.view(torch.uint8).clone() for k, v in model.state_dict().items() if "bias" not in k}


CASTS = {
    "to": lambda m: m.to(torch.bfloat16), "half": lambda m: m.half(), "float": lambda m: m.float(),
    "double": lambda m: m.double(), "bfloat16": lambda m: m.bfloat16(),
    "to both": lambda m: m.to("cpu", torch.bfloat16), "type": lambda m: m.type(torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_touches_stored_bytes(model, cast):
    before, dtypes = stored(model), {k: v.dtype for k, v in model.state_dict().items()}
    if cast == "type":  # Module.type casts every tensor by definition, integers too: refused by torch itself
        with pytest.raises(RuntimeError):
            CASTS[cast](model)
        return
    CASTS[cast](model)
    after = stored(model)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(v.dtype == dtypes[k] for k, v in model.state_dict().items() if "bias" not in k)


def test_other_parameters_are_cast(model):
    assert model.bfloat16()[0].bias.dtype == torch.bfloat16


def test_moves_to_meta(model):
    moved = copy.deepcopy(model).to("meta")
    assert moved[0].quantized.device.type == "meta"
    assert moved[0].quantized.data.dtype == torch.float8_e4m3fn


def test_state_dict_round_trip(model):
    state = model.state_dict()
    assert set(state) == {"0.weight", "0.scale", "0.bias", "2.weight", "2.scale"}
    other = torch.nn.Sequential(
        Linear.empty(192, 576, "fp8_128x128", bias=True),
        torch.nn.SiLU(),
        Linear.empty(64, 192, "fp8_128x128_ue8m0"),
    )
    other.load_state_dict(state)
    x = torch.randn(2, 576)
    assert torch.equal(model(x), other(x))


def test_a_packed_layer_saves_what_was_stored_and_loads_it():
    weight = blockscale.quantize(torch.randn(64, 128), "fp8_128x128")
    layer = Linear(weight)
    layer._hold(blockscale.convert(weight, "kn"))
    saved = layer.state_dict()
    assert torch.equal(saved["weight"].view(torch.uint8), weight.data.view(torch.uint8))
    layer.load_state_dict(saved)
    assert layer.layout == "row"


def test_a_lossy_layout_refuses_to_save():
    layer = Linear(blockscale.quantize(torch.randn(64, 128), "fp8_128x128"))
    layer._hold(blockscale.convert(layer.quantized, "fnuz"))
    with pytest.raises(DtypeError, match="lossy"):
        layer.state_dict()


def test_names_are_the_checkpoints():
    layer = Linear(blockscale.quantize(torch.randn(64, 128), "fp8_128x128"), names=Names(scale="weight_scale_inv"))
    assert set(layer.state_dict()) == {"weight", "weight_scale_inv"}


def test_compiles_to_one_graph_and_agrees(model):
    x = torch.randn(3, 576)
    compiled = torch.compile(model, fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    y = torch.randn(5, 576)
    assert torch.equal(compiled(y), model(y))


def test_deepcopy_and_repr(model):
    other = copy.deepcopy(model)
    x = torch.randn(2, 576)
    assert torch.equal(other(x), model(x))
    assert "in_features=576, out_features=192, bias=True, format=fp8_128x128" in repr(model)


def test_nvfp4_linear():
    layer = Linear(blockscale.quantize(torch.randn(64, 128), "nvfp4"), numerics="weight_only")
    assert set(layer.state_dict()) == {"weight", "scale", "global_scale"}
    x = torch.randn(2, 128)
    want = x @ blockscale.dequantize(layer.quantized).T
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


def test_bad_parts():
    w = blockscale.quantize(torch.randn(2, 64, 128), "fp8_128x128")
    with pytest.raises(ShapeError, match=r"needs a weight \[N, K\]"):
        Linear(w)
    with pytest.raises(ShapeError, match=r"needs bias \[64\], got \[3\]"):
        Linear(w[0], torch.zeros(3))


@pytest.mark.parametrize("k", [288, 575, 1152])
def test_an_x_of_another_k_is_an_error(k):
    """1152 = 2 x 576 would even fit, as twice the rows; 288 would have a kernel read past the end of x."""
    w = blockscale.quantize(torch.randn(3, 192, 576), "fp8_128x128")
    ends = torch.tensor([1, 2, 4], dtype=torch.int32)
    for shape in ((4, k), (2, 2, k), (k,)):
        with pytest.raises(ShapeError, match=rf"x \[.*{k}\] .*576"):
            Linear(w[0])(torch.randn(shape))
        with pytest.raises(ShapeError, match=r"K=576"):
            DenseLinear(576, 8).requires_grad_(False)(torch.randn(shape))
    with pytest.raises(ShapeError, match=rf"got \[4, {k}\], \[3, 192, 576\]"):
        StackedLinear(w)(torch.randn(4, k), ends)
    with pytest.raises(ShapeError, match=r"needs x \[\.\.\., 3, 576\]"):
        BlockDiagonalLinear(w)(torch.randn(4, 3, k))


@pytest.mark.parametrize(
    ("name", "other"), [("weight", torch.float32), ("weight", torch.uint8), ("scale", torch.bfloat16)]
)
def test_a_state_dict_in_another_dtype_is_an_error(name, other):
    """torch would convert the numbers: BF16 weights would become FP8 under scales that are not theirs."""
    layer = Linear(blockscale.quantize(torch.randn(192, 576), "fp8_128x128"))
    state = layer.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    with pytest.raises(RuntimeError, match=f"{name}: needs .* as it is stored here, got {other}"):
        layer.load_state_dict(state | {name: state[name].float().to(other)})
    assert all(torch.equal(a.view(torch.uint8), before[k].view(torch.uint8)) for k, a in layer.state_dict().items())


def test_experts_say_what_does_not_fit():
    gate_up, down = (blockscale.quantize(torch.randn(3, *s), "fp8_128x128") for s in ((256, 64), (64, 128)))
    experts = Experts(gate_up, down)
    for index, weights in ((torch.zeros(5, 2), torch.ones(5, 3)), (torch.zeros(4, 2), torch.ones(4, 2))):
        with pytest.raises(ShapeError, match=r"Experts: needs x \[T, K\], index \[T, k\] and weights \[T, k\]"):
            experts(torch.randn(5, 64), index.long(), weights)
