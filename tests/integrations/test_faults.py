"""Faults planted into a loaded model: the comparison with the naive implementation must see each of them."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import blockscale
import naive_models
from blockscale.integrations import transformers as integration
from makers import make_deepseek_v3, make_deepseek_v4

TOLERANCE = 1e-3
IDS = torch.randint(2, 300, (1, 16), generator=torch.Generator().manual_seed(5))


class Subject:
    """A loaded model and the logits that it should give."""

    def __init__(self, folder, **acts):
        self.model = integration.load(folder / "stored", dtype=torch.float32, kernel="reference")
        linears = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, (blockscale.nn.Linear, blockscale.nn.BlockDiagonalLinear))
        }
        plain = naive_models.plain_checkpoint(folder / "stored", folder / "plain")
        with torch.no_grad():
            self.want = naive_models.model(plain, linears, **acts)(IDS).logits
        self.layer = self.model.model.layers[1]

    def error(self):
        with torch.no_grad():
            return float((self.model(IDS).logits - self.want).norm() / self.want.norm())


@pytest.fixture(scope="module")
def v4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v4")
    make_deepseek_v4(folder / "stored", mtp=False)
    act = partial(naive_models.e4m3, group=128, powers=True, floor=1e-4)
    return Subject(folder, linear=act, experts=act, weigh_first=True)


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v3")
    make_deepseek_v3(folder / "stored", mtp=False)
    act = partial(naive_models.e4m3, group=128, powers=False, floor=1e-10)
    return Subject(folder, linear=act, experts=act)


def planted(subject, module, change):
    """The error with `module`'s weight replaced by `change(weight)`; the module is mended afterwards."""
    whole = module.quantized
    module.set_weight(change(whole))
    try:
        return subject.error()
    finally:
        module.set_weight(whole)


def with_parts(w, data=None, scale=None):
    return blockscale.BlockScaled(w.data if data is None else data, w.scale if scale is None else scale, w.format,
                                  shape=w.shape)  # fmt: skip


def test_without_a_fault_both_agree(v3, v4):
    assert v3.error() <= TOLERANCE
    assert v4.error() <= TOLERANCE


def test_a_skipped_scale_is_seen(v3):
    error = planted(v3, v3.layer.self_attn.o_proj, lambda w: with_parts(w, scale=torch.ones_like(w.scale)))
    assert error > TOLERANCE


def test_transposed_blocks_are_seen(v3):
    module = v3.layer.self_attn.o_proj
    assert module.quantized.scale.shape == (2, 2)
    assert planted(v3, module, lambda w: with_parts(w, scale=w.scale.mT.contiguous())) > TOLERANCE


def test_swapped_nibbles_are_seen(v4):
    def swap(w):
        byte = w.data.view(torch.uint8)
        return with_parts(w, data=(byte << 4 | byte >> 4).view(w.data.dtype))

    assert planted(v4, v4.layer.mlp.experts.down, swap) > TOLERANCE


def test_fp32_scales_rounded_to_powers_of_two_are_seen(v3):
    rounded = lambda w: with_parts(w, scale=torch.exp2(torch.ceil(torch.log2(w.scale))))  # noqa: E731
    assert planted(v3, v3.layer.self_attn.o_proj, rounded) > TOLERANCE


def test_e8m0_read_as_a_number_is_seen(v4):
    """An E8M0 byte is an exponent; its neighbour is twice as much."""
    one_up = lambda w: with_parts(w, scale=(w.scale.view(torch.uint8) + 1).view(w.scale.dtype))  # noqa: E731
    assert planted(v4, v4.layer.self_attn.o_b_proj, one_up) > TOLERANCE


def test_e8m0_read_as_a_rounded_fp32_is_seen(v4):
    """The byte converted to fp32 as if it were a number: 119 instead of 2^-8."""

    def as_number(w):
        return with_parts(w, scale=w.scale.view(torch.uint8).float())

    assert planted(v4, v4.layer.self_attn.o_b_proj, as_number) > TOLERANCE


def test_fp32_scales_for_activations_instead_of_powers_of_two_are_seen(v4):
    """What an engine does that ignores scale_fmt: ue8m0."""
    module = v4.layer.mlp.experts.down
    right = module.numerics
    module.numerics = replace(right, act_rounding="none", mxfp4_act="fp8_1x128")
    try:
        assert planted(v4, module, lambda w: w) > TOLERANCE  # set_weight binds the numerics anew
    finally:
        module.numerics = right
        module.set_weight(module.quantized)


def test_a_routing_weight_applied_twice_is_seen(v4):
    twice = v4.layer.mlp.experts.register_forward_pre_hook(lambda m, args: (args[0], args[1], args[2] * args[2]))
    try:
        assert v4.error() > TOLERANCE
    finally:
        twice.remove()


def test_a_routing_weight_in_the_other_place_is_seen(v4):
    v4.layer.mlp.experts.weigh_first = False
    try:
        assert v4.error() > TOLERANCE
    finally:
        v4.layer.mlp.experts.weigh_first = True
