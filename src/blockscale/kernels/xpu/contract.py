"""The ops of the package vllm-xpu-kernels as our adapters know them, and the check that they still are.

The package's interface moves between releases. Each adapter is written for one schema; a platform says which schema
is installed, and a difference is a refusal that shows both. What the ops do beyond their schemas is below, and the
contract tests run the adapters against CPU implementations that behave the same (tests/intel/standin.py).

Source: the wheel 0.1.16.2 (schemas; its Python callers) and the package's C++ sources as published on GitHub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from ...platform import Platform

PACKAGE = "vllm-xpu-kernels"

SCHEMAS = {
    "_C::per_token_group_fp8_quant": "(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
    "_C::static_scaled_fp8_quant": "(Tensor! result, Tensor input, Tensor scale, (int, int)? group_shape=None) -> ()",
    "_C::dynamic_per_token_scaled_fp8_quant": "(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
    "_C::silu_and_mul_per_block_quant": "(Tensor! out, Tensor input, Tensor! scales, int group_size, "
    "Tensor? scale_ub=None, bool is_scale_transposed=False, bool scale_ue8m0=False) -> ()",
    "_xpu_C::fp8_gemm": "(Tensor A, Tensor B, ScalarType? out_dtype, Tensor? A_scale_, Tensor? B_scale_, "
    "Tensor? bias_) -> Tensor",
    "_xpu_C::fp8_bmm": "(Tensor A, Tensor B, ScalarType? out_dtype, Tensor? A_scale_, Tensor? B_scale_, "
    "Tensor? bias_) -> Tensor",
    "_xpu_C::fp8_gemm_w8a16": "(Tensor A, Tensor B, Tensor? B_scale_, Tensor? bias_) -> Tensor",
    "_xpu_C::fp4_gemm": "(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, ScalarType? out_dtype, "
    "Tensor? bias_) -> Tensor",
    "_xpu_C::cutlass_grouped_gemm_interface": "(Tensor ptr_A, Tensor? ptr_A_scale, Tensor ptr_B, Tensor? ptr_B_scale, "
    "Tensor? ptr_bias, Tensor ptr_D, Tensor rows_per_expert, int N, int K, int num_experts) -> Tensor",
}
"""Op -> the schema that its adapter was written for."""

SCALE_FLOOR = 1.0 / (448.0 * 512.0)
"""Smallest scale that the package's quantizers write, whatever `eps` says."""


def refusals(platform: Platform, *ops: str) -> Iterator[str]:
    """Why these ops cannot be called on the platform; nothing if they can."""
    if platform.kind != "xpu":
        yield f"{PACKAGE} runs on xpu, not on {platform.kind}"
        return
    version = platform.value(PACKAGE)
    if version is None:
        yield f"needs the package {PACKAGE}, which is not there"
        return
    error = platform.value(f"{PACKAGE}.error")
    if error is not None:
        yield f"{PACKAGE} {version} cannot be loaded: {error}"
    for op in ops:
        expected, installed = op + SCHEMAS[op], platform.schema(op)
        if installed is None:
            yield f"{PACKAGE} {version}: {op} is not in it, or its schema is not on record"
        elif _normal(installed) != _normal(expected):
            yield f"{op} has changed: installed {installed}, this adapter was written for {expected}"


def call(op: str, *args: Any) -> Any:
    """Call a package's op by its full name; the selection has checked its schema."""
    namespace, name = op.split("::")
    return getattr(getattr(torch.ops, namespace), name)(*args)


def _normal(schema: str) -> str:
    """One spelling of a schema's spaces; anything else that differs is a difference."""
    return re.sub(r"\s+", " ", schema).replace("( ", "(").replace(" )", ")").strip()
