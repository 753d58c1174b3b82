"""Layers and models over 2, 3, 4 and 8 ranks (Gloo) equal one process."""

from functools import cache

import numpy as np
import pytest
import torch
from rank_checks import IDS

from blockscale.integrations import transformers as integration

COLUMNS = [
    (576, 256, "fp8_128x128", "checkpoint", torch.bfloat16, True),
    (192, 256, "fp8_128x128", "deepseek_v4", torch.float32, False),
    (320, 256, "mxfp4", "checkpoint", torch.bfloat16, True),
    (320, 128, "fp8_row", "checkpoint", torch.float32, True),
    (320, 128, "fp8_tensor", "checkpoint", torch.bfloat16, True),
    (320, 256, "nvfp4", "weight_only", torch.bfloat16, True),
]
ROWS = [
    (64, 320, "fp8_128x128", "checkpoint", torch.float32, 128, False),
    (64, 192, "fp8_128x128", "deepseek_v4", torch.bfloat16, 128, True),
    (64, 320, "fp8_row", "checkpoint", torch.float32, 16, False),
    (64, 320, "mxfp4", "deepseek_v4", torch.float32, 128, False),
    (64, 320, "fp8_128x128", "weight_only", torch.bfloat16, 128, False),
    (64, 1024, "fp8_128x128", "deepseek_v3", torch.bfloat16, 128, False),
    (64, 1024, "fp8_128x128", "deepseek_v3,sums=bfloat16", torch.bfloat16, 128, True),
    (64, 320, "fp8_128x128", "deepseek_v3,sums=bfloat16", torch.float32, 128, False),
]
MODELS = ("v3", "v4", "qwen3")


@cache
def one_process(folder, numerics):
    model = integration.load(folder, dtype=torch.float32, numerics=numerics)
    with torch.no_grad():
        return model(IDS).logits.numpy()


@pytest.mark.parametrize("case", COLUMNS, ids=lambda c: f"{c[0]}x{c[1]}-{c[2]}")
def test_columns_are_bit_equal(ranks, case):
    ranks.run("column", *case)


def test_fused_columns_come_back_in_order(ranks):
    ranks.run("fused_column", 320, 256, "fp8_128x128")


@pytest.mark.parametrize("case", ROWS, ids=lambda c: f"{c[0]}x{c[1]}-{c[2]}-{c[3]}")
def test_rows_are_within_the_order_of_a_sum(ranks, case):
    cut = ranks.run("row", *case)
    inside = case[3] != "weight_only" and case[1] // 128 < ranks.size
    assert all(groups > 0 for groups in cut) or not inside


@pytest.mark.parametrize("bias", [False, True])
def test_large_sums_go_by_halves(ranks, bias):
    answers = ranks.run("halves", bias)
    for got, usual in answers:
        assert np.array_equal(got, answers[0][0])
        assert np.allclose(got, usual, rtol=2**-7, atol=1e-6)  # one bf16 step, where the order of a sum differs
        assert ranks.size > 2 or np.array_equal(got, usual)


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_a_model_equal_those_of_one_process(ranks, folders, name):
    """With the activations quantized as the checkpoint asks, groups cut between ranks included."""
    for found, worst in ranks.run("modules", folders[name], "reference", "dispatch"):
        assert found["ParallelExperts"] >= 1
        assert found["ColumnParallelLinear"] >= 4
        assert worst < 2e-6


@pytest.mark.parametrize(
    ("name", "exchange"), [("v3", "dispatch"), ("v3", "reduce"), ("v4", "dispatch"), ("qwen3", "reduce")]
)
def test_a_model_equals_one_process(ranks, folders, name, exchange):
    """Weight-only, where a sum in another order stays a small difference: E4M3 would round some across an edge."""
    options = {"latents": "split"} if exchange == "reduce" else {}
    want = one_process(folders[name], "weight_only")
    answers = ranks.run("logits", folders[name], "weight_only", exchange, **options)
    for got, read, share in answers:
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-6
        assert np.array_equal(got, answers[0][0])
        assert share <= read <= 1.01 * share


@pytest.mark.parametrize("name", MODELS)
def test_columns_alone_make_a_bit_equal_model(ranks, folders, name):
    if ranks.ep != ranks.size:
        with pytest.raises(AssertionError, match="gather needs whole experts"):
            ranks.run("logits", folders[name], gather=True)
        return
    want = one_process(folders[name], "reference")
    for got, read, share in ranks.run("logits", folders[name], gather=True):
        assert np.array_equal(got, want)
        assert read == share


@pytest.mark.parametrize("exchange", ["dispatch", "reduce"])
def test_ranks_without_tokens_and_experts_without_rows(ranks, exchange):
    ranks.run("zero_tokens", 9, exchange)


@pytest.mark.parametrize("numerics", ["deepseek_v3", "deepseek_v4", "weight_only"])
def test_tokens_on_all_ranks(ranks, numerics):
    if numerics == "weight_only":
        with pytest.raises(AssertionError, match="weight-only numerics have nothing to fuse"):
            ranks.run("mlp", 1, numerics)
        return
    for error, quantized in [*ranks.run("mlp", 2, numerics), *ranks.run("mlp", 1, numerics)]:
        assert error < 4e-3
        assert quantized is True


@pytest.mark.parametrize("ranks", [(2, 2)], indirect=True, ids=["2-ranks"])
def test_one_graph_under_torch_compile(ranks):
    ranks.run("compiled")


@pytest.mark.parametrize("ranks", [(3, 3)], indirect=True, ids=["3-ranks"])
def test_it_generates_the_same_tokens_on_every_rank(ranks, folders):
    made = ranks.run("tokens_of", folders["qwen3"], 5)
    assert all(tokens == made[0] for tokens in made)
    assert len(made[0]) == 5
