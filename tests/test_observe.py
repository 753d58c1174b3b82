import os
import subprocess
import sys

import pytest
import torch

import blockscale
from blockscale import UnknownNameError, observe

SCRIPT = """
import torch, blockscale
w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128", kernel="reference")
blockscale.linear(torch.randn(2, 128), w, kernel="reference")
blockscale.linear(torch.randn(2, 128), w, kernel="reference")
"""


def test_decisions_are_logged_once_each():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "BLOCKSCALE_LOG": "decisions"},
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("blockscale: ")]
    assert len(lines) == 2
    assert "linear [M, 128] x [64, 128] fp8_128x128" in lines[1]
    assert "M 1..: reference.linear" in lines[1]


def test_unknown_topics_raise():
    with pytest.raises(UnknownNameError, match="'decisions'"):
        observe.configure("decision")


def test_an_unknown_topic_in_the_environment_is_raised_by_the_first_choice_not_by_the_import():
    script = SCRIPT.replace("w =", "print('imported'); w =")
    env = {**os.environ, "BLOCKSCALE_LOG": "decision"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert result.stdout == "imported\n"
    assert "UnknownNameError: unknown log topic 'decision'" in result.stderr


def test_calls_are_counted_by_kernel():
    w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128")
    before = observe.calls["reference.linear"]
    for _ in range(3):
        blockscale.linear(torch.randn(2, 128), w, kernel="reference")
    assert observe.calls["reference.linear"] == before + 3


def test_profiles_name_op_shape_and_kernel():
    w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128")
    with torch.profiler.profile() as profile:
        blockscale.linear(torch.randn(2, 128), w, kernel="reference")
    names = {event.key for event in profile.key_averages()}
    assert "blockscale.linear[2x64x128] reference.linear" in names
    assert "blockscale::linear" in names


def test_every_op_is_counted_and_named_in_profiles():
    w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128", kernel="reference")
    experts = blockscale.quantize(torch.randn(2, 64, 128), "fp8_128x128", kernel="reference")
    x, order = torch.randn(2, 128), "reference"
    before = observe.calls.copy()
    with torch.profiler.profile() as profile:
        q = blockscale.quantize(x, "fp8_1x128", kernel=order)
        blockscale.matmul(q, w, kernel=order)
        blockscale.grouped_linear(x, experts, torch.tensor([1, 2], dtype=torch.int32), kernel=order)
        blockscale.dense_linear(x, torch.randn(64, 128), kernel=order)
        blockscale.swiglu_quantize(torch.randn(2, 256), "fp8_1x128", kernel=order)
        blockscale.rmsnorm_quantize(x, torch.ones(128), 1e-6, "fp8_1x128", kernel=order)
    names = {event.key for event in profile.key_averages()}
    for op, n in (("quantize", 0), ("matmul", 64), ("grouped_linear", 64), ("dense_linear", 64)):
        assert f"blockscale.{op}[2x{n}x128] reference.{op}" in names
    for op in ("quantize", "matmul", "grouped_linear", "dense_linear", "swiglu_quantize", "rmsnorm_quantize"):
        assert observe.calls[f"reference.{op}"] == before[f"reference.{op}"] + 1
