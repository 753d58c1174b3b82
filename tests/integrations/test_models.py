"""Every model family, as its checkpoints are stored: loads, equals the naive implementation, generates, saves back."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import blockscale
import naive_models
from blockscale.integrations import transformers as integration
from makers import make_deepseek_v3, make_deepseek_v4, make_minimax_m2, make_qwen3_moe

V3 = partial(naive_models.e4m3, group=128, powers=False, floor=1e-10)
V32 = partial(naive_models.e4m3, group=128, powers=True, floor=1e-4)
V41 = partial(naive_models.e4m3, group=32, powers=True, floor=1e-4)
NVFP4 = partial(naive_models.nvfp4, level=torch.tensor(6.0 / (448 * 6)))
HF = partial(naive_models.e4m3, group=128, powers=False, floor=1e-10)
HF_FP4 = partial(naive_models.e4m3, group=32, powers=True, floor=1e-10)

CASES = {
    "v3": (make_deepseek_v3, {}, {"linear": V3, "experts": V3}),
    "v3-ragged-k": (make_deepseek_v3, {"ragged_k": True}, {"linear": V3, "experts": V3}),
    "v3.2": (make_deepseek_v3, {"v32": True}, {"linear": V32, "experts": V32}),
    "v4-fp4": (make_deepseek_v4, {}, {"linear": V32, "experts": V32, "weigh_first": True}),
    "v4-fp8": (make_deepseek_v4, {"experts": "fp8"}, {"linear": V32, "experts": V32, "weigh_first": True}),
    "v4-fp8-compressor": (
        make_deepseek_v4,
        {"experts": "fp8", "compressor_fp8": True},
        {"linear": V32, "experts": V32, "weigh_first": True},
    ),
    "v4-nvfp4": (make_deepseek_v4, {"experts": "nvfp4"}, {"linear": V32, "experts": NVFP4, "weigh_first": True}),
    "v4-32": (make_deepseek_v4, {"block": 32}, {"linear": V41, "experts": V41, "weigh_first": True}),
    "qwen3-moe": (make_qwen3_moe, {}, {"linear": V3, "experts": V3}),
    "qwen3-moe-ragged": (make_qwen3_moe, {"intermediate": 192}, {"linear": V3, "experts": V3}),
    "minimax-m2": (make_minimax_m2, {}, {"linear": V3, "experts": V3}),
}
IDS = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    make, options, acts = CASES[request.param]
    folder = make(tmp_path_factory.mktemp(request.param) / "stored", **options)
    # An ordered kernel, so that one order of sums is compared with another only where the models differ: rounding to
    # E4M3 turns a difference of 1e-7 into one of 6e-2 in the few elements that lie on an edge.
    return folder, integration.load(folder, dtype=torch.float32, kernel="reference"), acts


def ours(model):
    kinds = (blockscale.nn.Linear, blockscale.nn.BlockDiagonalLinear)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def relative_error(model, naive):
    with torch.no_grad():
        got, want = model(IDS).logits, naive(IDS).logits
    return float((got - want).norm() / want.norm())


def test_the_model_equals_dequantize_and_fake_quantize(case, tmp_path):
    folder, model, acts = case
    naive = naive_models.model(naive_models.plain_checkpoint(folder, tmp_path / "plain"), ours(model), **acts)
    assert relative_error(model, naive) <= 1e-3


def test_no_block_scaled_weight_of_the_model_is_left_out(case):
    """Multi-token prediction layers apart, which transformers' models do not have."""
    folder, model, _ = case
    extra = ("mtp.", f"model.layers.{model.config.num_hidden_layers}.")
    on_disk = sum(
        tensor.numel()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if name.endswith("weight") and tensor.element_size() == 1 and not name.startswith(extra)
    )
    modules = [m for m in model.modules() if isinstance(m, blockscale.nn.WeightModule)]
    assert sum(m.quantized.data.numel() for m in modules) == on_disk


def test_it_generates(case):
    _, model, _ = case
    tokens = model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 27)


def test_saving_gives_back_every_byte_and_name(case, tmp_path):
    folder, model, _ = case
    model.save_pretrained(tmp_path)
    before = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    after = {n: t for f in tmp_path.glob("*.safetensors") for n, t in load_file(f).items()}
    assert before.keys() == after.keys()
    different = [
        name
        for name, t in before.items()
        if t.dtype != after[name].dtype
        or t.shape != after[name].shape
        or not torch.equal(t.flatten().view(torch.uint8), after[name].flatten().view(torch.uint8))
    ]
    assert different == []
