"""Every launch that ships for an Intel GPU, recorded from the launchers: a layer of DeepSeek's shape, a ragged one.

Tiles, constants, alignments and options are those that a user's GPU would be given; M picks them, so each row of the
report holds the launches of several M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from executor import executing, platform_of

from blockscale.formats import get_format
from blockscale.kernels.triton import gemm, grouped, quantize
from blockscale.numerics import get_numerics
from blockscale.tensor import BlockScaled

BF16 = torch.bfloat16
MULTIPLIED = [
    ("fp8_128x128", "checkpoint"), ("fp8_128x128", "weight_only"),
    ("fp8_128x128_ue8m0", "deepseek_v4"), ("fp8_32x32_ue8m0", "deepseek_v4_1"), ("fp8_64x64_ue8m0", "weight_only"),
    ("fp8_row", "checkpoint"), ("fp8e5m2_128x128", "checkpoint"), ("mxfp8", "checkpoint"),
    ("mxfp4", "deepseek_v4"), ("mxfp4", "weight_only"), ("nvfp4", "checkpoint"), ("nvfp4", "weight_only"),
]  # fmt: skip
EXPERTS = [
    ("fp8_128x128", "checkpoint"), ("fp8_128x128", "weight_only"), ("mxfp4", "deepseek_v4"), ("mxfp4", "weight_only"),
    ("nvfp4", "checkpoint"), ("nvfp4", "weight_only"),
]  # fmt: skip
QUANTIZED = [
    ("fp8_1x128", "row"), ("fp8_1x128", "tma"), ("fp8_1x128_ue8m0", "ue8m0x4"), ("fp8_1x32_ue8m0", "row"),
    ("fp8_128x128", "row"), ("fp8_row", "row"), ("fp8_tensor", "row"), ("mxfp4", "row"), ("nvfp4", "row"),
]  # fmt: skip


def weight(name: str, n: int, k: int, experts: int = 0) -> BlockScaled:
    """An uninitialised weight `[n, k]` or `[experts, n, k]`: nothing reads it."""
    fmt, lead = get_format(name), (experts,) if experts else ()
    data = torch.empty(*lead, *fmt.data_shape(n, k), dtype=fmt.element.dtype)
    scale = torch.empty(*lead, *fmt.scale_shape(n, k), dtype=fmt.scale_dtype)
    level = torch.empty(lead, dtype=torch.float32) if fmt.two_level else None
    return BlockScaled.trusted(data, scale, fmt, "row", (*lead, n, k), level)


def multiply(target: str, name: str, numerics: str) -> None:
    platform, policy = platform_of(target), get_numerics(numerics)
    for m in (1, 16, 64, 128, 4096):
        gemm.linear(torch.empty(m, 2048, dtype=BF16), weight(name, 576, 2048), None, policy, BF16, platform)
    bias = torch.empty(130, dtype=BF16)
    gemm.linear(torch.empty(5, 200, dtype=BF16), weight(name, 130, 200), bias, policy, BF16, platform)


def experts(target: str, name: str, numerics: str) -> None:
    ends = torch.empty(8, dtype=torch.int32)
    for m, n, k in ((16, 512, 2048), (4096, 512, 2048), (40, 192, 200)):
        x, w = torch.empty(m, k, dtype=BF16), weight(name, n, k, 8)
        grouped.grouped_linear(x, w, ends, get_numerics(numerics), BF16, platform_of(target))


def routed(target: str, name: str, numerics: str, rows: grouped.Rows) -> None:
    """Rows in a buffer for each expert (64 of them), or as they came, two experts each."""
    ends = torch.empty(8, dtype=torch.int32) if rows == "masked" else torch.empty(64, 2, dtype=torch.int32)
    x, w = torch.empty(8 * 64 if rows == "masked" else 64, 2048, dtype=BF16), weight(name, 512, 2048, 8)
    grouped.grouped_linear(x, w, ends, get_numerics(numerics), BF16, platform_of(target), rows=rows)


def quantizer(target: str, name: str, layout: str) -> None:
    for rows in (1, 4096):
        quantize.quantize(torch.empty(rows, 2048, dtype=BF16), get_format(name), platform_of(target), layout=layout)


def fused(target: str, op: str) -> None:
    x, fmt, platform = torch.empty(64, 4096, dtype=BF16), get_format("fp8_1x128"), platform_of(target)
    if op == "swiglu":
        quantize.swiglu_quantize(x, fmt, platform, limit=7.0, routing_weight=torch.empty(64))
    else:
        quantize.rmsnorm_quantize(x, torch.empty(4096, dtype=BF16), 1e-6, fmt, platform)


def shipped(target: str) -> dict[str, list[dict[str, Any]]]:
    """Row name -> its launches, as requests to the worker, each different one once."""
    calls: dict[str, Callable[[], None]] = {}
    for name, layout in QUANTIZED:
        calls[f"quantize {name} {layout}"] = lambda n=name, where=layout: quantizer(target, n, where)  # type: ignore[misc]
    for op in ("swiglu", "rmsnorm"):
        calls[f"quantize {op} fp8_1x128"] = lambda o=op: fused(target, o)  # type: ignore[misc]
    for name, policy in MULTIPLIED:
        calls[f"linear {name} {policy}"] = lambda n=name, p=policy: multiply(target, n, p)  # type: ignore[misc]
    for name, policy in EXPERTS:
        calls[f"grouped {name} {policy}"] = lambda n=name, p=policy: experts(target, n, p)  # type: ignore[misc]
    for name, policy in (("fp8_128x128", "checkpoint"), ("mxfp4", "weight_only")):
        calls[f"grouped masked {name} {policy}"] = lambda n=name, p=policy: routed(target, n, p, "masked")  # type: ignore[misc]
        calls[f"grouped pairs {name} {policy}"] = lambda n=name, p=policy: routed(target, n, p, "pairs")  # type: ignore[misc]
    found = {}
    for row, call in calls.items():
        with executing(None, target) as log:
            call()
        kernels = ("gemm_kernel", "grouped_kernel") if row.startswith(("linear", "grouped")) else None
        requests = [r for r in log.requests if kernels is None or r["kernel"] in kernels]
        found[row] = [{**r, "buffers": {}} for r in requests]  # a multiplication's quantizer has a row of its own
    return found
