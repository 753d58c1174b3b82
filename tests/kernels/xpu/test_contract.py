"""The adapters, end to end, over CPU ops that behave like the package's; planted faults."""

from dataclasses import replace

import pytest
import torch

from blockscale import conformance, layouts, reference
from blockscale.conformance import Case, check
from blockscale.formats import get_format
from blockscale.kernels.xpu import KERNELS, multiply, quantize
from blockscale.numerics import get_numerics
from blockscale.platform import Platform
from blockscale.registry import Problem, explain
from intel import standin

standin.install()

BF16, F32 = torch.bfloat16, torch.float32
BMG = Platform.parse("xpu:bmg+triton+vllm-xpu-kernels=0.1.16")
LINEAR = Case("linear", "fp8_128x128", 5, 192, 512)


def kernel(name, op):
    return next(k for k in KERNELS if (k.name, k.op) == (name, op))


def refusals(problem, name, platform=BMG):
    return next(d.reasons for d in explain(problem, platform) if d.kernel.name == name)


def notes(problem, name, platform=BMG):
    return next(d.notes for d in explain(problem, platform) if d.kernel.name == name)


def linear(n, k, format="fp8_128x128", dtype=BF16, numerics="checkpoint", op="linear", groups=0):
    return Problem(op, n, k, dtype, get_format(format), "row", dtype, get_numerics(numerics), groups)


# -- every adapter against the definition ------------------------------------------------------------------------


def test_every_adapter_conforms_over_ops_that_behave_like_the_package():
    report = conformance.run("cpu", kernel="xpu", platform=BMG)
    assert report.failures == []
    assert report.kernels.keys() >= {
        "xpu.fp8_gemm", "xpu.fp8_gemm_w8a16", "xpu.fp8_bmm", "xpu.grouped_gemm_mxfp4", "xpu.group_quantize",
        "xpu.row_quantize", "xpu.static_quantize", "xpu.swiglu_quantize",
    }  # fmt: skip
    assert report.cases == report.passed > 120


EXTRA = [
    ("xpu.fp8_gemm", Case("linear", "fp8_128x128", 1, 576, 7168)),
    ("xpu.fp8_gemm", Case("linear", "fp8_128x128", 33, 144, 256)),
    ("xpu.fp8_gemm", Case("linear", "fp8_128x128", 7, 129, 128)),
    ("xpu.fp8_gemm", Case("linear", "fp8_128x128_ue8m0", 7, 320, 384, numerics="deepseek_v4")),
    ("xpu.fp8_gemm", Case("linear", "fp8_128x128", 5, 192, 256, edge="bias")),
    ("xpu.fp8_gemm", Case("linear", "fp8_128x128", 5, 192, 256, edge="strided")),
    ("xpu.fp8_gemm", Case("linear", "fp8_128x128", 5, 192, 256, edge="nan_row")),
    ("xpu.fp8_gemm", Case("linear", "fp8_128x128", 5, 192, 256, edge="tiny")),
    ("xpu.fp8_gemm", Case("linear", "fp8_row", 5, 192, 256, edge="zero_row")),
    ("xpu.fp8_gemm", Case("linear", "fp8_tensor", 5, 192, 256, edge="strided")),
    ("xpu.fp8_gemm", Case("matmul", "fp8_128x128", 1, 192, 128)),
    ("xpu.fp4_gemm", Case("matmul", "mxfp4", 5, 192, 256, numerics="checkpoint,mxfp4_act=mxfp4")),
    ("xpu.fp8_gemm_w8a16", Case("linear", "fp8_128x128", 5, 192, 576, numerics="weight_only", edge="strided")),
    ("xpu.fp8_gemm_w8a16", Case("linear", "fp8_128x128", 5, 256, 128, numerics="weight_only")),
    ("xpu.grouped_gemm", Case("grouped_linear", "fp8_128x128", 37, 256, 384, numerics="weight_only", groups=5)),
    ("xpu.grouped_gemm", Case("grouped_linear", "fp8_128x128_ue8m0", 9, 128, 128, numerics="weight_only", groups=5)),
    ("xpu.grouped_gemm_mxfp4", Case("grouped_linear", "mxfp4", 37, 320, 384, numerics="weight_only", groups=5)),
    ("xpu.fp8_bmm", Case("grouped_linear", "fp8_128x128", 24, 192, 128, groups=8)),
    ("xpu.fp8_bmm", Case("grouped_linear", "fp8_128x128_ue8m0", 24, 256, 384, numerics="deepseek_v4", groups=8)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "case"), EXTRA, ids=lambda v: str(v))
def test_shapes_that_the_ops_guess_wrong(name, case):
    chosen = kernel(name, case.op)
    assert list(chosen.why_not(replace(case.problem(), layout=chosen.layout), BMG)) == []
    failure, _ = check(chosen, case)
    assert failure is None, failure


OPERANDS = [
    ("xpu.fp8_gemm", Case("linear", "fp8_128x128", 5, 192, 256)),
    ("xpu.fp8_gemm", Case("linear", "fp8_128x128_ue8m0", 5, 192, 128, edge="bias")),
    ("xpu.fp8_gemm", Case("linear", "fp8_tensor", 5, 192, 128, edge="nan_row")),
    ("xpu.fp8_gemm", Case("matmul", "fp8_128x128", 5, 192, 256)),
    ("xpu.fp4_gemm", Case("matmul", "mxfp4", 5, 192, 256, numerics="checkpoint,mxfp4_act=mxfp4")),
    ("xpu.fp8_gemm_w8a16", Case("linear", "fp8_128x128", 5, 192, 576, numerics="weight_only", edge="strided")),
    ("xpu.fp8_bmm", Case("grouped_linear", "fp8_128x128", 24, 192, 256, groups=8)),
    ("xpu.grouped_gemm", Case("grouped_linear", "fp8_128x128", 37, 256, 384, numerics="weight_only", groups=5)),
    ("xpu.grouped_gemm_mxfp4", Case("grouped_linear", "mxfp4", 37, 320, 384, numerics="weight_only", groups=5)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "case"), OPERANDS, ids=lambda v: str(v))
def test_a_caller_s_tensors_are_never_written_to(name, case):
    chosen, o = kernel(name, case.op), conformance.operands.make(case)
    w = layouts.convert(o.w, chosen.layout)
    x = reference.quantize_activations(o.x, case.problem().x_format, o.w, case.policy) if case.op == "matmul" else o.x
    third = () if case.op == "matmul" else (o.where if case.op == "grouped_linear" else o.bias,)
    parts = [x] if isinstance(x, torch.Tensor) else [x.data, x.scale]
    held = [t.view(torch.uint8) if t.element_size() == 1 else t for t in (*parts, w.data, w.scale)]
    held += [t for t in third if t is not None]
    before, versions = [t.clone() for t in held], [t._version for t in held]
    chosen.run(case.problem(), x, w, *third)
    for now, then, version in zip(held, before, versions, strict=True):
        assert torch.equal(now.nan_to_num() if now.is_floating_point() else now,
                           then.nan_to_num() if then.is_floating_point() else then)  # fmt: skip
        assert now._version == version


@pytest.mark.parametrize("name", ["xpu.group_quantize", "xpu.row_quantize", "xpu.static_quantize"])
def test_a_quantizer_writes_to_nothing_that_it_was_given(name):
    x, scale = torch.randn(4, 256), torch.rand(4, 2) + 0.1
    x[0, 3], before, given = torch.nan, None, None
    fmt = {"xpu.row_quantize": "fp8_row"}.get(name, "fp8_1x128")
    static = name == "xpu.static_quantize"
    before, given = x.clone(), scale.clone()
    problem = Problem("quantize", 0, 256, F32, get_format(fmt), static=static)
    q = kernel(name, "quantize").run(problem, x, scale if static else None, 1e-10)
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    assert torch.equal(scale, given)
    assert q.data.view(torch.uint8)[0, 3] == 0x7F


def test_a_floor_that_the_op_ignores_is_computed_instead():
    x = torch.full((3, 256), 1e-3)
    problem = Problem("quantize", 0, 256, F32, get_format("fp8_1x128"))
    q = quantize.GroupQuantize().run(problem, x, None, 0.5)
    assert q.scale.flatten().tolist() == pytest.approx([0.5 / 448] * 6)
    assert torch.equal(q.scale, reference.quantize(x, get_format("fp8_1x128"), floor=0.5).scale)


@pytest.mark.parametrize("ulp", [1 - 2.0**-24, 1 + 2.0**-23])
def test_an_exponential_that_misses_a_power_of_two_by_an_ulp_costs_no_factor_of_two(ulp, monkeypatch):
    case, honest = Case("quantize", "fp8_1x128_ue8m0", 5, 0, 384), standin.scale_of
    monkeypatch.setattr(standin, "scale_of", lambda y, dims, ue8m0=False: honest(y, dims, ue8m0) * ulp)
    failure, _ = check(quantize.GroupQuantize(), case)
    assert failure is None, failure


def test_what_is_not_finite_stays_visible_and_alone():
    x = torch.ones(2, 256)
    x[0, 1], x[1, 200] = torch.nan, torch.inf
    q = quantize.GroupQuantize().run(Problem("quantize", 0, 256, F32, get_format("fp8_1x128")), x, None, 1e-10)
    want = reference.quantize(x, get_format("fp8_1x128"))
    assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(q.scale, want.scale)


# -- planted faults: each is one that an adapter could have -------------------------------------------------------


def scales_not_transposed(run, p, x, w, b):
    return run(p, x, replace(w, scale=w.scale.mT.contiguous().view(w.scale.shape)), b)


def k128_unguarded(run, p, x, w, b, patch):
    patch.setattr(multiply, "repeated", lambda s, dim, width, size: s)
    return run(p, x, w, b)


def ragged_unguarded(run, p, x, w, b, patch):
    patch.setattr(multiply, "gcd", lambda a, b: 128)
    return run(p, x, w, b)


def quantizer_off(run, p, x, w, b, patch):
    patch.setattr(quantize, "SCALE_FLOOR", 1.0)
    real = multiply.quantize
    patch.setattr(multiply, "quantize", lambda *a: replace(real(*a), scale=real(*a).scale * 1.01))
    return run(p, x, w, b)


def activations_left_alone(run, p, x, w, b):
    return (x.double() @ reference.dequantize(layouts.convert(w, "row")).double().mT).to(p.out_dtype)


class Faulty(multiply.Linear):
    def __init__(self, fault):
        self.fault = fault

    def run(self, problem, x, w, bias):
        return self.fault(super().run, problem, x, w, bias)


PLANTED = [
    (scales_not_transposed, LINEAR),
    (k128_unguarded, Case("linear", "fp8_128x128", 5, 256, 128)),
    (ragged_unguarded, LINEAR),
    (quantizer_off, LINEAR),
    (activations_left_alone, LINEAR),
]


@pytest.mark.parametrize(("fault", "case"), PLANTED, ids=lambda v: getattr(v, "__name__", None))
def test_planted_faults_are_caught(fault, case, monkeypatch):
    assert check(multiply.Linear(), case)[0] is None
    planted = fault if fault.__code__.co_argcount == 5 else lambda *a: fault(*a, monkeypatch)
    failure, error = check(Faulty(planted), case)
    assert failure is not None
    assert error > 1


def test_the_stand_in_reads_past_the_scales_at_k_128():
    """The fault that a guard prevents, seen at the op itself: 256 scales wanted, 2 there."""
    case = Case("linear", "fp8_128x128", 1, 256, 128)
    o = conformance.operands.make(case)
    q = reference.quantize_activations(o.x, get_format("fp8_1x128"), o.w, case.policy)
    y = torch.ops._xpu_C.fp8_gemm(q.data, o.w.data.mT, BF16, q.scale, o.w.scale.mT.contiguous(), None)
    want = conformance.operands.expected(case, o).value
    assert ((y.double() - want).abs() / want.abs().mean()).max() > 10


def test_a_transposed_scale_flag_means_nothing_to_the_group_op():
    x, q = torch.randn(4, 256), torch.empty(4, 256, dtype=torch.float8_e4m3fn)
    by_flag, by_stride = torch.zeros(4, 2), torch.zeros(2, 4).mT
    for scale, flag in ((by_flag, True), (by_stride, False)):
        torch.ops._C.per_token_group_fp8_quant(x, q, scale, 128, 1e-10, -448.0, 448.0, False, flag, flag)
    assert torch.equal(by_flag, by_stride)
    assert by_stride.stride() == (1, 4)


class WrongLayout(quantize.GroupQuantize):
    """Trusts the flag: hands a row-major tensor over as if it were column-major."""

    def run(self, problem, x, scale, floor):
        q = super().run(replace(problem, layout="row"), x, scale, floor)
        return replace(q, scale=q.scale.reshape(q.scale.shape[1], q.scale.shape[0]), layout="col_scales")


class DropsNan(quantize.GroupQuantize):
    def run(self, problem, x, scale, floor):
        return super().run(problem, x.nan_to_num(448.0), scale, floor)


class TwoCodesOff(quantize.GroupQuantize):
    def run(self, problem, x, scale, floor):
        q = super().run(problem, x, scale, floor)
        data = q.data.view(torch.uint8).clone()
        data[0, 5] = (data[0, 5] & 0x7F) - 2 if data[0, 5] & 0x7F > 2 else 3
        return replace(q, data=data.view(torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        (WrongLayout, Case("quantize", "fp8_1x128", 7, 0, 384, layout="col_scales")),
        (DropsNan, Case("quantize", "fp8_1x128", 5, 0, 384, F32, edge="nonfinite")),
        (TwoCodesOff, Case("quantize", "fp8_1x128", 5, 0, 384, F32)),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_planted_quantizer_faults_are_caught(fault, case):
    assert check(quantize.GroupQuantize(), case)[0] is None
    assert check(fault(), case)[0] is not None
