"""The adapters, end to end, over CPU ops that behave like the package's; planted faults; schemas and their drift."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockscale import conformance, layouts, reference
from blockscale.conformance import Case, check
from blockscale.formats import get_format
from blockscale.kernels.xpu import KERNELS, contract, grouped, multiply, quantize
from blockscale.numerics import get_numerics
from blockscale.platform import Platform, schema_text
from blockscale.registry import Problem, explain, select


def beside(name):
    """A module of this folder, once a process: ops can be registered only once."""
    key = f"tests_kernels_xpu_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, Path(__file__).with_name(f"{name}.py"))
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


standin = beside("standin")
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


def test_a_caller_s_tensors_are_never_written_to():
    case = Case("linear", "fp8_128x128", 5, 192, 256)
    o = conformance.operands.make(case)
    w = layouts.convert(o.w, "col_scales")
    before = [t.clone() for t in (o.x, w.data.view(torch.uint8), w.scale)]
    multiply.Linear().run(case.problem(), o.x, w, None)
    for now, then in zip((o.x, w.data.view(torch.uint8), w.scale), before, strict=True):
        assert torch.equal(now, then)


def test_a_floor_that_the_op_ignores_is_computed_instead():
    x = torch.full((3, 256), 1e-3)
    problem = Problem("quantize", 0, 256, F32, get_format("fp8_1x128"))
    q = quantize.GroupQuantize().run(problem, x, None, 0.5)
    assert q.scale.flatten().tolist() == pytest.approx([0.5 / 448] * 6)
    assert torch.equal(q.scale, reference.quantize(x, get_format("fp8_1x128"), floor=0.5).scale)


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


# -- schemas -----------------------------------------------------------------------------------------------------


def test_adapters_were_written_for_the_schemas_on_record():
    recorded = standin.RECORD["schemas"]
    assert {op: contract._normal(op + schema) for op, schema in contract.SCHEMAS.items()} == {
        op: contract._normal(recorded[op]) for op in contract.SCHEMAS
    }


def test_installed_schemas_compare_equal_as_torch_prints_them():
    for op, schema in contract.SCHEMAS.items():
        (installed,) = torch._C._jit_get_schemas_for_operator(op)
        assert contract._normal(schema_text(installed)) == contract._normal(op + schema)


OLD_GROUPED = (
    "_xpu_C::cutlass_grouped_gemm_interface(Tensor ptr_A, Tensor ptr_B, Tensor? ptr_scales, Tensor? ptr_bias, "
    "Tensor ptr_D, Tensor expert_first_token_offset, int N, int K, int num_experts, bool is_B_int4, "
    "bool is_B_mxfp4) -> Tensor"
)
"""What an earlier release called the same: offsets of experts instead of counts, for one."""


def test_a_changed_schema_is_refused_and_both_are_shown():
    drifted = replace(BMG, ops=(*(o for o in BMG.ops if o[0] != grouped.GROUPED), (grouped.GROUPED, OLD_GROUPED)))
    problem = linear(256, 256, "mxfp4", numerics="weight_only", op="grouped_linear", groups=4)
    assert refusals(problem, "xpu.grouped_gemm_mxfp4") == ()
    (reason,) = refusals(problem, "xpu.grouped_gemm_mxfp4", drifted)
    assert "expert_first_token_offset" in reason
    assert "rows_per_expert" in reason
    assert refusals(linear(256, 256), "xpu.fp8_gemm", drifted) == ()


def test_an_op_that_is_gone_and_a_version_without_a_record():
    gone = replace(BMG, ops=tuple(o for o in BMG.ops if o[0] != multiply.GEMM))
    assert "_xpu_C::fp8_gemm is not in it" in refusals(linear(256, 256), "xpu.fp8_gemm", gone)[0]
    unknown = Platform.parse("xpu:bmg+vllm-xpu-kernels=0.1.9")
    assert "0.1.9: _xpu_C::fp8_gemm is not in it, or its schema is not on record" in " ".join(
        refusals(linear(256, 256), "xpu.fp8_gemm", unknown)
    )


def test_a_package_that_does_not_load_is_refused_with_its_error():
    broken = BMG.with_features([("vllm-xpu-kernels.error", "libsycl.so.8: cannot open shared object file")])
    assert "libsycl.so.8" in refusals(linear(256, 256), "xpu.fp8_gemm", broken)[0]


@pytest.mark.parametrize("text", ["cpu:avx2", "cuda:sm_90+triton", "xpu:bmg+triton"])
def test_no_adapter_accepts_without_the_package(text):
    platform = Platform.parse(text)
    for case in conformance.cases(quick=True):
        assert not any(d.accepted for d in explain(case.problem(), platform) if d.kernel.name.startswith("xpu."))


# -- guards: literal shapes --------------------------------------------------------------------------------------

GUARDS = [
    (linear(256, 200), "xpu.fp8_gemm", "K=200 is not a multiple of 128"),
    (linear(129, 256), "xpu.fp8_gemm", "gcd(N, 128) = 1 is not a multiple of 16"),
    (linear(136, 256), "xpu.fp8_gemm", "gcd(N, 128) = 8 is not a multiple of 16"),
    (linear(256, 256, dtype=F32), "xpu.fp8_gemm", "x is torch.float32"),
    (linear(256, 256, "fp8_32x32_ue8m0"), "xpu.fp8_gemm", "blocks of (32, 32)"),
    (linear(256, 256, "fp8fnuz_128x128"), "xpu.fp8_gemm", "multiplies E4M3FN, not fp8fnuz"),
    (linear(256, 256, numerics="deepseek_v4_1"), "xpu.fp8_gemm", "need groups of (1, 128)"),
    (linear(256, 256, numerics="weight_only"), "xpu.fp8_gemm", "these are left as they are"),
    (linear(129, 256, numerics="weight_only"), "xpu.fp8_gemm_w8a16", "needs a multiple of 16"),
    (linear(256, 256), "xpu.fp8_gemm_w8a16", "checkpoint quantizes them to fp8_1x128"),
    (linear(256, 192, op="grouped_linear", groups=4, numerics="weight_only"), "xpu.grouped_gemm", "whole blocks"),
    (linear(256, 256, op="grouped_linear", groups=64), "xpu.fp8_bmm", "only up to 16 groups"),
    (Problem("quantize", 0, 200, BF16, get_format("fp8_1x128")), "xpu.group_quantize", "cols=200"),
    (Problem("quantize", 0, 256, BF16, get_format("mxfp8")), "xpu.group_quantize", "not down"),
    (Problem("quantize", 0, 256, BF16, get_format("fp8_1x128"), "ue8m0x4"), "xpu.group_quantize", "writes layouts"),
    (Problem("swiglu_quantize", 0, 256, F32, get_format("fp8_1x128")), "xpu.swiglu_quantize", "x is torch.float32"),
]


@pytest.mark.parametrize(("problem", "name", "reason"), GUARDS, ids=lambda v: v if isinstance(v, str) else None)
def test_guards(problem, name, reason):
    assert reason in " ".join(refusals(problem, name))


NOTES = [
    (linear(576, 512), "xpu.fp8_gemm", "repeated to blocks of 128x64"),
    (linear(256, 128), "xpu.fp8_gemm", "repeated to N"),
    (linear(256, 256, "fp8_128x128_ue8m0"), "xpu.fp8_gemm", "decoded to fp32 in each call"),
    (linear(256, 256), "xpu.fp8_gemm", "copied where it is not contiguous"),
    (linear(192, 576, numerics="weight_only"), "xpu.fp8_gemm_w8a16", "repeated to blocks of 64x64"),
    (Problem("quantize", 0, 256, BF16, get_format("fp8_1x128_ue8m0")), "xpu.group_quantize", "stored as E8M0"),
    (Problem("quantize", 0, 256, BF16, get_format("fp8_tensor")), "xpu.static_quantize", "computed by torch"),
]


@pytest.mark.parametrize(("problem", "name", "note"), NOTES, ids=lambda v: v if isinstance(v, str) else None)
def test_copies_are_mentioned(problem, name, note):
    assert note in " ".join(notes(problem, name))


def test_the_order_on_xpu_for_a_deepseek_v3_layer():
    names = [d.kernel.name for d in explain(linear(576, 7168), BMG)]
    assert names.index("xpu.fp8_gemm") < names.index("reference.linear")
    assert str(select(linear(576, 7168), BMG)) == "M 1..: xpu.fp8_gemm"
    assert select(linear(576, 7168), BMG).layout == "col_scales"
    assert str(select(linear(576, 7168), Platform.parse("xpu:bmg"))) == "M 1..: reference.linear"


def test_a_described_version_may_be_short():
    for text in ("xpu:bmg+vllm-xpu-kernels", "xpu:bmg+vllm-xpu-kernels=0.1.16", "xpu+vllm-xpu-kernels=0.1.16.2"):
        assert Platform.parse(text).schema("_xpu_C::fp8_gemm") is not None
    for text in ("xpu:bmg+vllm-xpu-kernels=0.1.1", "xpu:bmg+vllm-xpu-kernels=0.2", "xpu:bmg"):
        assert Platform.parse(text).schema("_xpu_C::fp8_gemm") is None
