"""What the adapters ask of a platform: schemas and their drift, guards, notes of copies, and the order of kernels."""

from dataclasses import replace

import pytest
import torch

from blockscale import conformance
from blockscale.formats import get_format
from blockscale.kernels.triton import capability
from blockscale.kernels.xpu import contract, grouped, multiply
from blockscale.numerics import get_numerics
from blockscale.package_ops import schema_text
from blockscale.platform import Platform
from blockscale.registry import Problem, explain, select
from intel import standin

standin.install()

BF16, F32 = torch.bfloat16, torch.float32
BMG = Platform.parse("xpu:bmg+triton+vllm-xpu-kernels=0.1.16")


def refusals(problem, name, platform=BMG):
    return next(d.reasons for d in explain(problem, platform) if d.kernel.name == name)


def notes(problem, name, platform=BMG):
    return next(d.notes for d in explain(problem, platform) if d.kernel.name == name)


def linear(n, k, format="fp8_128x128", dtype=BF16, numerics="checkpoint", op="linear", groups=0):
    return Problem(op, n, k, dtype, get_format(format), "row", dtype, get_numerics(numerics), groups)


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


EVERYTHING = "xpu:bmg+triton=3.6+torch=2.13+scaled_mm=row+vllm-xpu-kernels=0.1.16"
ORDER = [
    # op, what is there, who accepts, best first
    ("linear", EVERYTHING, ["xpu.fp8_gemm", "torch_scaled.xpu_row", "triton.block", "reference.linear"]),
    ("linear", EVERYTHING.replace("row", "column"),
     ["xpu.fp8_gemm", "torch_scaled.xpu_column", "triton.block", "reference.linear"]),
    ("linear", "xpu:bmg+triton=3.6+scaled_mm=row", ["torch_scaled.xpu_row", "triton.block", "reference.linear"]),
    ("linear", "xpu:bmg+triton=3.6+scaled_mm=no: not supported", ["triton.block", "reference.linear"]),
    ("linear", "xpu:bmg", ["reference.linear"]),
    ("grouped_linear", EVERYTHING, ["xpu.fp8_bmm", "triton.block", "reference.grouped_linear"]),
    ("quantize", EVERYTHING, ["xpu.group_quantize", "triton.block", "reference.quantize"]),
    ("swiglu_quantize", EVERYTHING, ["xpu.swiglu_quantize", "triton.block", "reference.swiglu_quantize"]),
]  # fmt: skip


@pytest.mark.parametrize(("op", "platform", "order"), ORDER)
def test_the_order_on_xpu(op, platform, order):
    fmt = get_format("fp8_1x128" if op.endswith("quantize") else "fp8_128x128")
    problem = Problem(op, 0 if op.endswith("quantize") else 512, 7168, BF16, fmt, groups=8 if op[0] == "g" else 0)
    accepted = [d.kernel.name for d in explain(problem, Platform.parse(platform)) if d.accepted]
    waiting = {"triton.codec", "triton.invariant"}  # variants of triton.block that only an order brings to run
    assert [n for n in accepted if n not in waiting] == order


def test_a_deepseek_v3_layer_takes_the_package_and_its_layout():
    assert str(select(linear(576, 7168), BMG)) == "M 1..: xpu.fp8_gemm"
    assert select(linear(576, 7168), BMG).layout == "col_scales"


# -- casts that Intel's compiler gets wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["pvc", "bmg", "dg2"])
@pytest.mark.parametrize("triton", ["", "=3.3.0b1", "=3.4.0", "=3.5.1", "=9.9"])
def test_no_triton_casts_to_fp8_on_xpu_by_itself(arch, triton):
    """triton-xpu before 3.5 saturates at 256; later ones were never run, so they use the codec too."""
    platform = Platform.parse(f"xpu:{arch}+triton{triton}")
    for element in ("fp8", "fp8e5m2", "fp8fnuz"):
        assert not capability.native_cast(platform, element)
        assert not capability.native_load(platform, element)
        assert not capability.dot_element(platform, element)


@pytest.mark.parametrize(("triton", "served"), [("3.3.0b1", False), ("3.3.1", False), ("3.4.0", True), ("3.5", True)])
def test_a_triton_with_the_known_bug_is_refused(triton, served):
    platform = Platform.parse(f"xpu:bmg+triton={triton}")
    reasons = refusals(linear(256, 256), "triton.block", platform)
    assert (not reasons) == served
    assert served or f"needs triton 3.4 or newer, got {triton}" in reasons


def test_a_described_version_may_be_short():
    for text in ("xpu:bmg+vllm-xpu-kernels", "xpu:bmg+vllm-xpu-kernels=0.1.16", "xpu+vllm-xpu-kernels=0.1.16.2"):
        assert Platform.parse(text).schema("_xpu_C::fp8_gemm") is not None
    for text in ("xpu:bmg+vllm-xpu-kernels=0.1.1", "xpu:bmg+vllm-xpu-kernels=0.2", "xpu:bmg"):
        assert Platform.parse(text).schema("_xpu_C::fp8_gemm") is None
