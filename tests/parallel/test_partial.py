"""The ops of ranks, on one: what they compute, and that they are seen like all others."""

import torch

import blockscale
from blockscale import observe
from blockscale.parallel.partial import OPS

HOW = ("fp8_128x128", "row", "checkpoint", "reference")


def test_addends_are_fp32_and_counted():
    w = blockscale.quantize(torch.randn(2, 64, 256), "fp8_128x128")
    x, ends = torch.randn(4, 256, dtype=torch.bfloat16), torch.tensor([1, 4], dtype=torch.int32)
    before = observe.calls.copy()
    with torch.profiler.profile() as profile:
        y = OPS.partial_linear(x, w.data[0], w.scale[0], None, None, 64, 256, *HOW)
        experts = OPS.partial_grouped_linear(x, w.data, w.scale, None, None, ends, 64, 256, *HOW)
    assert (y.dtype, experts.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y.bfloat16(), blockscale.linear(x, w[0]), rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(experts.bfloat16(), blockscale.grouped_linear(x, w, ends), rtol=2**-7, atol=2**-7)
    made = observe.calls - before
    assert made["reference.linear"] >= 1
    assert made["reference.grouped_linear"] >= 1
    names = {event.key for event in profile.key_averages()}
    assert {f"blockscale.{op}[4x64x256] reference.{op}" for op in ("linear", "grouped_linear")} <= names
