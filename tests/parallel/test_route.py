"""How sums travel: decided from plain facts, on any machine."""

import pytest

from blockscale import Platform
from blockscale.numerics import get_numerics
from blockscale.parallel.route import why_not_direct
from blockscale.platform import apart
from blockscale.policy import model_policy

CARD = Platform.parse("cuda:sm_90+triton=3.6")


@pytest.mark.parametrize(
    ("here", "ranks", "local", "found", "reasons"),
    [
        (CARD, 2, 2, [], []),
        (CARD, 8, 8, [], []),
        (CARD, 16, 8, [], ["16 ranks are spread over hosts, 8 of them here", "16 ranks, at most 8 are served"]),
        (CARD, 2, 2, ["device 0 does not reach the memory of 1"], ["device 0 does not reach the memory of 1"]),
        (Platform.parse("cuda:sm_90"), 2, 2, [], ["its kernels need triton"]),
        (Platform.parse("cpu"), 2, 2, [], ["cpu devices: only cuda devices share memory in this version"]),
        (Platform.parse("rocm:gfx942"), 2, 2, [], ["rocm devices: only cuda devices share memory in this version"]),
    ],
)  # fmt: skip
def test_every_reason_against_direct_sums(here, ranks, local, found, reasons):
    assert list(why_not_direct(here, ranks, local, found)) == reasons


def test_devices_that_cannot_be_seen_are_apart():
    assert apart("xpu", 2) == ["xpu devices: not known"]
    assert "of 99 devices" in apart("cuda", 99)[0]


def test_sums_are_numerics_that_somebody_asks_for():
    assert get_numerics("deepseek_v3").sums == "float32"
    asked = get_numerics("deepseek_v3,sums=bfloat16")
    assert get_numerics(str(asked)) == asked
    assert asked.sum_dtype.itemsize == 2


@pytest.mark.parametrize("name", ["reference", "hf"])
def test_a_policy_takes_changes(name):
    config = {"model_type": "deepseek_v3", "quantization_config": {"weight_block_size": [128, 128]}}
    plain, changed = model_policy(name, config), model_policy(f"{name},sums=bfloat16", config)
    assert changed.name == f"{name},sums=bfloat16"
    assert changed.linear == get_numerics(f"{plain.linear},sums=bfloat16")
    assert changed.weigh_first == plain.weigh_first
    assert "asked for" in dict(changed.sources)["linear"]
