"""Every model family, as its checkpoints are stored: loads, equals the naive implementation, generates, saves back."""

import pytest
import torch
from safetensors.torch import load_file

import blockscale
import model_agreement
import naive_models
from blockscale.integrations import transformers as integration
from model_cases import CASES

IDS = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    model = CASES[request.param]
    folder = model.write(tmp_path_factory.mktemp(request.param) / "stored")
    # An ordered kernel, so that one order of sums is compared with another only where the models differ: rounding to
    # E4M3 turns a difference of 1e-7 into one of 6e-2 in the few elements that lie on an edge.
    return folder, integration.load(folder, dtype=torch.float32, kernel="reference"), model.acts


def relative_error(model, naive):
    with torch.no_grad():
        got, want = model(IDS).logits, naive(IDS).logits
    return float((got - want).norm() / want.norm())


def test_the_model_equals_dequantize_and_fake_quantize(case, tmp_path):
    folder, model, acts = case
    naive = naive_models.model(
        naive_models.plain_checkpoint(folder, tmp_path / "plain"), naive_models.quantized_linears(model), **acts
    )
    assert relative_error(model, naive) <= 1e-3


def test_every_linear_on_the_default_kernels_equals_the_definition(case):
    """Of a prompt and of a single token, on the inputs that it has in the model."""
    folder, model, _ = case
    fast = integration.load(folder, dtype=torch.float32)
    checks = [
        check
        for ids in (IDS, IDS[:, :1])
        for check in model_agreement.check_layers(fast, model, model_agreement.layer_inputs(model, ids))
    ]
    assert [c for c in checks if not c.passed] == []
    assert {c.name for c in checks} >= {n for n, m in fast.named_modules() if isinstance(m, blockscale.nn.WeightModule)}


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
