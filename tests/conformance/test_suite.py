"""The suite passes what is right and fails what is wrong: each planted fault is one that real kernels have had."""

import json

import pytest
import torch

import blockscale
from blockscale import UnknownNameError, conformance, reference
from blockscale.conformance import Case, check
from blockscale.kernels.reference import Linear, Quantize

LINEAR = Case("linear", "fp8_128x128", 5, 192, 576, torch.float32)


def test_every_kernel_on_this_cpu_conforms():
    report = conformance.run("cpu", workers=2)
    assert report.failures == []
    assert report.cases == report.passed > 3700
    assert set(report.kernels) >= {"reference.linear", "reference.quantize", "reference.grouped_linear"}


class Faulty(Linear):
    """The reference with one fault planted."""

    name = "faulty.linear"
    priority = 10_000

    def __init__(self, fault):
        self.fault = fault

    def run(self, problem, x, w, bias):
        return self.fault(super().run, problem, x, w, bias)


def zeroed_row(run, p, x, w, b):
    y = run(p, x, w, b)
    y[-1] = 0
    return y


def shifted_scale(run, p, x, w, b):
    scale = w.scale.clone()
    scale[0, 0] = scale[0, 1]
    return run(p, x, blockscale.BlockScaled(w.data, scale, w.format), b)


def missing_tail(run, p, x, w, b):
    y = torch.empty(x.shape[0], p.n)
    y[:, :-1] = run(p, x, w, b)[:, :-1]
    return y


def activations_not_quantized(run, p, x, w, b):
    return reference.linear(x, w, b, numerics=blockscale.get_numerics("weight_only"))


def half_precision(run, p, x, w, b):
    return run(p, x.bfloat16().float(), w, b)


def wrong_dtype(run, p, x, w, b):
    return run(p, x, w, b).bfloat16()


def raises(run, p, x, w, b):
    raise RuntimeError("no such symbol")


FAULTS = [zeroed_row, shifted_scale, missing_tail, activations_not_quantized, half_precision, wrong_dtype, raises]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_planted_faults_are_caught(fault):
    failure, error = check(Faulty(fault), LINEAR)
    assert failure is not None
    assert failure.kernel == "faulty.linear"
    assert error > 1


def test_a_right_kernel_passes():
    failure, error = check(Faulty(lambda run, *args: run(*args)), LINEAR)
    assert failure is None
    assert error < 0.5


def test_a_zeroed_row_is_located():
    failure, _ = check(Faulty(zeroed_row), LINEAR)
    assert failure.coordinate[0] == 4
    assert failure.got == "0 (bytes 00000000)"


class WrongTies(Quantize):
    name = "faulty.quantize"

    def run(self, problem, x, scale, floor):
        q = super().run(problem, x, scale, floor)
        x = x * (1 + 2.0**-20)  # rounds ties up instead of to even
        return super().run(problem, x, q.scale if q.layout == "row" else None, floor)


def test_wrong_rounding_at_ties_is_caught_by_the_ties_case_alone():
    plain = Case("quantize", "fp8_1x128_ue8m0", 5, 0, 384, torch.float32)
    ties = Case("quantize", "fp8_1x128_ue8m0", 5, 0, 384, torch.float32, edge="ties")
    assert check(Quantize(), ties)[0] is None
    failure, _ = check(WrongTies(), ties)
    assert "data bytes" in failure.got
    assert str(plain) != str(ties)


def test_the_report_counts_a_faulty_kernel():
    kernel = blockscale.register(Faulty(zeroed_row))
    try:
        report = conformance.run("cpu", kernel="faulty", quick=True)
    finally:
        blockscale.unregister(kernel)
    assert (report.passed, report.failed) == (0, report.cases)
    assert report.cases == 4
    assert json.loads(json.dumps(report.to_json()))["failures"][0]["kernel"] == "faulty.linear"


def test_unknown_kernel():
    with pytest.raises(UnknownNameError, match="reference.linear"):
        conformance.run("cpu", kernel="reference.lin")


def test_cases_are_distinct_and_repeatable():
    every = [str(c) for c in conformance.cases()]
    assert len(every) == len(set(every))
    a, b = (conformance.operands.make(LINEAR) for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.w.data.view(torch.uint8), b.w.data.view(torch.uint8))
