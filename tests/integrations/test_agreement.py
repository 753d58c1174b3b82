"""The comparison that bench/device_models.py makes on a card, here with the arithmetic of the card simulated."""

from dataclasses import replace
from functools import cached_property

import pytest
import torch

import hopper_sums
import model_agreement
import naive_models
from blockscale.integrations import transformers as integration
from blockscale.nn import Linear, WeightModule
from model_cases import CASES

PROMPT, NEW = 24, 8
IDS = torch.randint(2, 300, (2, PROMPT), generator=torch.Generator().manual_seed(5))


class Pair:
    """The CPU's model, the same on Hopper's sums, the truth in fp64, and the walk through the CPU's tokens."""

    def __init__(self, name, folder):
        case = CASES[name]
        stored = case.write(folder / "stored", mtp=False)
        self.here = integration.load(stored, dtype=torch.float32, kernel="reference")
        self.there = integration.load(stored, dtype=torch.float32)
        linears = naive_models.quantized_linears(self.here)
        naive = naive_models.model(naive_models.plain_checkpoint(stored, folder / "plain"), linears, **case.acts)
        self.sequences = self.here.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        with torch.no_grad():
            self.truth = naive.double()(self.sequences[:, :-1]).logits[:, -NEW:]
        self.inputs = model_agreement.layer_inputs(self.here, IDS)

    def layers(self):
        return model_agreement.check_layers(self.there, self.here, self.inputs)

    @cached_property
    def bound(self):
        allowed = model_agreement.tolerances(self.there, self.inputs)
        return model_agreement.lead_bound(self.here, self.sequences[:, :-1], self.truth, allowed, draws=8)

    def tokens(self, model):
        logits = model_agreement.step_logits(model, self.sequences, PROMPT)
        return model_agreement.agreement(logits, self.truth, self.bound)


@pytest.fixture(scope="module", params=["v3", "v3.2", "v4-fp8"])
def pair(request, tmp_path_factory):
    with hopper_sums.registered():
        yield Pair(request.param, tmp_path_factory.mktemp(request.param))


def test_hopper_sums_keep_the_row_tolerance_and_need_it(pair):
    checks = pair.layers()
    assert [c for c in checks if not c.passed] == []
    worst = max(c.row_error for c in checks if c.kernel.startswith("hopper_sums"))
    assert 1e-4 < worst < 4e-4  # an H200: 1.4e-4 to 3.3e-4
    assert max(c.row_error for c in checks if not c.kernel.startswith("hopper_sums")) < model_agreement.FP32_TOLERANCE


def test_every_linear_is_checked(pair):
    names = {name for name, m in pair.here.named_modules() if isinstance(m, WeightModule)}
    assert names <= pair.inputs.keys()
    assert "lm_head" in pair.inputs


def test_tokens_agree_where_the_lead_exceeds_the_bound(pair):
    for model in (pair.here, pair.there):
        found = pair.tokens(model)
        assert found.positions == 2 * NEW
        assert found.decided > 0
        assert found.beyond == 0


def test_one_wrong_scale_is_seen(pair):
    name = next(n for n, m in pair.there.named_modules() if n.startswith("model.layers.1.") and isinstance(m, Linear))
    module = pair.there.get_submodule(name)
    whole = module.quantized
    scale = whole.scale.clone()
    scale[0, 0] *= 2
    module.set_weight(replace(whole, scale=scale))
    try:
        assert [c.name for c in pair.layers() if not c.passed] == [name]
    finally:
        module.set_weight(whole)


def test_a_damaged_model_is_seen_by_its_tokens(pair):
    damage = pair.there.lm_head.register_forward_hook(lambda m, args, y: y.roll(1, -1))
    try:
        assert pair.tokens(pair.there).beyond > 0
    finally:
        damage.remove()
