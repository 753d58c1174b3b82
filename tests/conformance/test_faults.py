"""Ten faults that real kernels have had, planted into a right kernel one at a time: the suite must catch each."""

import ctypes
from dataclasses import replace
from functools import cache

import pytest
import torch

import blockscale
from blockscale import conformance, reference
from blockscale.conformance import suite
from blockscale.kernels.reference import Linear, Quantize


class Planted:
    """A reference kernel with a fault in it, tried on few formats, so that it takes a second."""

    priority = 10_000
    formats = ("fp8_128x128",)

    def __init__(self, fault):
        self.fault, self.calls, self.kept = fault, 0, {}

    def run(self, problem, *args):
        self.calls += 1
        return self.fault(self, lambda *changed: super(Planted, self).run(problem, *(changed or args)), *args)


class PlantedLinear(Planted, Linear):
    name = "planted.linear"


class PlantedQuantize(Planted, Quantize):
    name = "planted.quantize"
    formats = ("fp8_1x128", "fp8_1x128_ue8m0")


@cache
def prepared(op, formats):
    """The suite's cases of these formats with their operands, made once for all faults."""
    chosen = [c for c in conformance.cases() if c.op == op and c.format in formats and c.numerics == "checkpoint"]
    return [(c, suite.prepare(c)) for c in chosen if c.layout == "row" and c.m * c.k < 1 << 16 and c.n * c.k < 1 << 17]


def found(kernel):
    """The suite on it: what it found in each of its cases."""
    report = conformance.Report("cpu")
    for case, operands in prepared(kernel.op, kernel.formats):
        report.add(kernel.name, str(case), *conformance.examine(kernel, case, "cpu", *operands))
    assert report.cases >= 20
    return report


# -- in a multiplication -------------------------------------------------------------------------------------------


def zeroed_row(k, run, x, w, bias):
    y = run()
    y[-1] = 0
    return y


def scale_off_by_a_block(k, run, x, w, bias):
    scale = w.scale.clone()
    scale[0] = scale[0].roll(1)
    return run(x, blockscale.BlockScaled(w.data, scale, w.format), bias)


def transposed_scale(k, run, x, w, bias):
    square = w.scale.shape[0] == w.scale.shape[1]
    return run(x, blockscale.BlockScaled(w.data, w.scale.T.contiguous(), w.format) if square else w, bias)


def missing_tail(k, run, x, w, bias):
    whole = x.shape[1] // 128 * 128
    return run(torch.cat([x[:, :whole], torch.zeros_like(x[:, whole:])], 1), w, bias)


def unwritten_tail(k, run, x, w, bias):
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    y[:, : w.shape[0] // 64 * 64] = run()[:, : w.shape[0] // 64 * 64]
    return y


def nan_swallowed(k, run, x, w, bias):
    return run().nan_to_num(0.0)


def nan_weight_swallowed(k, run, x, w, bias):
    data = w.data.view(torch.uint8)
    codes = torch.where((data & 0x7F) == 0x7F, data & 0xFE, data).view(w.data.dtype)
    return run(x, replace(w, data=codes), bias)


def stale_output(k, run, x, w, bias):
    return k.kept.setdefault((tuple(x.shape), tuple(w.shape)), run()).clone()


def shared_output(k, run, x, w, bias):
    y = k.kept.setdefault((tuple(x.shape), tuple(w.shape), x.dtype), run())
    return y.copy_(run())


def written_past_the_end(k, run, x, w, bias):
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    y.copy_(run())
    ctypes.memset(y.data_ptr() + y.nbytes, 0, 2)
    return y


def written_before_the_start(k, run, x, w, bias):
    y = torch.zeros(x.shape[0], w.shape[0], dtype=x.dtype)
    y += run()
    ctypes.memset(y.data_ptr() - 64, 0, 1)
    return y


def operand_changed(k, run, x, w, bias):
    y = run()
    x[0, 0] += 1
    return y


def not_deterministic(k, run, x, w, bias):
    y = run()
    return torch.nextafter(y.float(), torch.tensor(torch.inf)).to(y.dtype) if k.calls % 2 else y


def one_bit_too_few(k, run, x, w, bias):
    return (run().float() * (1 + 2.0**-7)).to(x.dtype)


MULTIPLY = {
    zeroed_row: "value", scale_off_by_a_block: "value", transposed_scale: "value", missing_tail: "value",
    unwritten_tail: "value", nan_swallowed: "value", nan_weight_swallowed: "value", stale_output: "value",
    shared_output: "alias", written_past_the_end: "memory", written_before_the_start: "memory",
    operand_changed: "input", not_deterministic: "repeat", one_bit_too_few: "value",
}  # fmt: skip


@pytest.mark.parametrize("fault", MULTIPLY, ids=lambda f: f.__name__)
def test_in_a_multiplication(fault):
    report = found(PlantedLinear(fault))
    assert report.failed
    assert MULTIPLY[fault] in {f.check for f in report.failures}


def test_a_fault_is_found_only_where_it_is():
    report = found(PlantedLinear(transposed_scale))
    assert {f.case.split(" ", 2)[2] for f in report.failures} == {
        "M=5 N=129 K=200 bfloat16 checkpoint plain",  # the two square grids among its cases: 2x2
        "M=64 N=256 K=256 bfloat16 checkpoint plain",
    }


# -- in a quantizer ------------------------------------------------------------------------------------------------


def quantized_zeroed_row(k, run, x, scale, floor):
    q = run()
    q.data.view(torch.uint8)[-1] = 0
    return q


def quantized_scale_off(k, run, x, scale, floor):
    q = run()
    return replace(q, scale=torch.cat([q.scale[:1].roll(1, -1), q.scale[1:]]))


def quantized_transposed(k, run, x, scale, floor):
    q = run()
    square = q.scale.shape[0] == q.scale.shape[1]
    return replace(q, scale=q.scale.T.contiguous() if square else q.scale)


def quantized_missing_tail(k, run, x, scale, floor):
    q = run()
    whole = x.shape[1] // 128 * 128
    if whole < x.shape[1]:
        q.data.view(torch.uint8)[:, whole:] = 0
    return q


def ties_rounded_up(k, run, x, scale, floor):
    q = run()
    return run((x.float() * (1 + 2.0**-20)).to(x.dtype), q.scale, floor)


def saturation_missing(k, run, x, scale, floor):
    q = run()
    step = blockscale.layouts.decode_scale(q.scale).repeat_interleave(128, 1)[:, : x.shape[1]]
    over = x.float().abs() / step > 464  # the middle between 448 and what would come next
    return replace(
        q, data=torch.where(over, 0x7F, q.data.view(torch.uint8)).to(torch.uint8).contiguous().view(q.data.dtype)
    )


def quantized_nan_swallowed(k, run, x, scale, floor):
    return run(x.nan_to_num(0.0, 0.0, 0.0), scale, floor)


def quantized_stale(k, run, x, scale, floor):
    q = k.kept.setdefault((tuple(x.shape), x.dtype, scale is None, k.fault), run())
    return replace(q, data=q.data.clone(), scale=q.scale.clone())


def quantized_past_the_end(k, run, x, scale, floor):
    q = run()
    data = torch.empty(q.data.shape, dtype=q.data.dtype)
    data.view(torch.uint8).copy_(q.data.view(torch.uint8))
    ctypes.memset(data.data_ptr() + data.nbytes + 100, 7, 1)
    return replace(q, data=data)


def quantized_differently(k, run, x, scale, floor):
    q = run()
    if k.calls % 3 == 0:
        q.data.view(torch.uint8)[0, 0] ^= 1
    return q


QUANTIZE = {
    quantized_zeroed_row: "value", quantized_scale_off: "value", quantized_transposed: "value",
    quantized_missing_tail: "value", ties_rounded_up: "value", saturation_missing: "value",
    quantized_nan_swallowed: "value", quantized_stale: "value", quantized_past_the_end: "memory",
    quantized_differently: "repeat",
}  # fmt: skip


@pytest.mark.parametrize("fault", QUANTIZE, ids=lambda f: f.__name__)
def test_in_a_quantizer(fault):
    report = found(PlantedQuantize(fault))
    assert report.failed
    assert QUANTIZE[fault] in {f.check for f in report.failures}


@pytest.mark.parametrize(
    ("fault", "edges"), [(saturation_missing, {"saturate", "static"}), (quantized_nan_swallowed, {"nonfinite"})]
)
def test_rare_faults_need_their_edge(fault, edges):
    report = found(PlantedQuantize(fault))
    assert {f.case.split()[-1] for f in report.failures} <= edges


@pytest.mark.parametrize("kernel", [PlantedLinear, PlantedQuantize])
def test_without_a_fault_all_is_right(kernel):
    report = found(kernel(lambda k, run, *args: run()))
    assert report.failures == []
    assert report.green


def test_the_reference_itself_is_what_it_is_compared_with():
    x = torch.randn(3, 256)
    q = reference.quantize(x, blockscale.get_format("fp8_1x128"))
    assert torch.equal(blockscale.quantize(x, "fp8_1x128").data.view(torch.uint8), q.data.view(torch.uint8))
