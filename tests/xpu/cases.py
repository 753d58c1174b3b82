"""What the executed tier tries: few cases, each of which finds a fault that others would miss.

An OpenCL build takes seconds to minutes, so launches share compiled kernels and tiles are small: 32x32x32, which
every edge below is ragged against. The kernels, their constants and their launchers are those that ship.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from executor import Worker, executing, platform_of

from blockscale import conformance, reference
from blockscale.conformance import Case
from blockscale.formats import get_format
from blockscale.kernels import triton as family
from blockscale.kernels.triton import capability, gemm, grouped, quantize
from blockscale.tuning import GemmTile, QuantizeTile

F32 = torch.float32


@dataclass
class Row:
    """One line of build/xpu.json.

    stage: "compiled", "executed" or "machine code". max_error: the worst error as a fraction of what conformance
    allows (fp32 sums; no allowance for the hardware), null for quantizers; equal_bytes: of what was compared.
    """

    kernel: str
    target: str
    stage: str
    cases: int
    max_error: float | None = None
    equal_bytes: str | None = None
    spills: int | None = None
    dpas: int | None = None
    seconds: float | None = None
    fault: str | None = None


class Linear(family.Linear):
    accumulation_error = 0.0


class GroupedLinear(family.GroupedLinear):
    accumulation_error = 0.0


_QUANTIZE = family.Quantize()
W8A8 = "fp8_128x128"
GROUPS = [
    Case("quantize", "fp8_1x128", 5, 0, 384, F32),
    Case("quantize", "fp8_1x128", 5, 0, 384, F32, edge="nonfinite"),
    Case("quantize", "fp8_1x128", 5, 0, 384, F32, edge="tiny"),
    Case("quantize", "fp8_1x128", 5, 0, 384, F32, edge="ties"),
    Case("quantize", "fp8_1x128", 3, 0, 384, F32, edge="zeros"),
]
EXECUTED: list[tuple[str, str, Any, list[Case]]] = [
    # kernel, target, the kernel class, cases of one or two builds
    ("quantize 1x128", "pvc", _QUANTIZE, GROUPS),
    ("quantize 1x128 ragged", "dg2", _QUANTIZE, [Case("quantize", "fp8_1x128", 3, 0, 576 - 24)]),
    ("quantize 1x128 ue8m0", "bmg", _QUANTIZE, [Case("quantize", "fp8_1x128_ue8m0", 7, 0, 576)]),
    ("quantize 16x32", "pvc", _QUANTIZE, [Case("quantize", "fp8_16x32", 21, 0, 72)]),
    ("quantize mxfp4", "pvc", _QUANTIZE, [Case("quantize", "mxfp4", 3, 0, 96), Case("quantize", "mxfp4", 5, 0, 96)]),
    ("swiglu quantize", "pvc", family.SwigluQuantize(), [Case("swiglu_quantize", "fp8_1x128", 3, 0, 384)]),
    ("linear w8a8", "pvc", Linear(), [Case("linear", W8A8, m, 72, 200) for m in (35, 50)]),
    ("linear w8a8", "bmg", Linear(), [Case("linear", W8A8, 35, 72, 200)]),
    ("linear w8a8", "dg2", Linear(), [Case("linear", W8A8, 35, 72, 200)]),
    ("linear w8a16", "pvc", Linear(), [Case("linear", W8A8, 35, 72, 200, numerics="weight_only")]),
    ("grouped w8a8", "pvc", GroupedLinear(), [Case("grouped_linear", W8A8, m, 72, 200, groups=5) for m in (37, 9)]),
]


def linears_split_k() -> tuple[str, str, Any, list[Case]]:
    return "linear w8a8 split-K", "pvc", Linear(), [Case("linear", W8A8, 5, 72, 384)]


@contextmanager
def small_tiles(split: int = 1) -> Iterator[None]:
    """32x32x32 for multiplications, two groups for quantizers."""
    held = gemm.gemm_tile, grouped.gemm_tile, quantize.quantize_tile

    def tile(*args: Any, **kwargs: Any) -> GemmTile:
        return replace(held[0](*args, **kwargs), bm=32, bn=32, bk=32, warps=4, stages=2, split=split, swap=False)

    gemm.gemm_tile = grouped.gemm_tile = tile
    quantize.quantize_tile = lambda *args, **kwargs: QuantizeTile(2, 1, 4, "small, for OpenCL")
    try:
        yield
    finally:
        gemm.gemm_tile, grouped.gemm_tile, quantize.quantize_tile = held


def execute(worker: Worker, name: str, target: str, kernel: Any, cases: list[Case], split: int = 1) -> Row:
    """Compile, run and compare all cases of one line."""
    quantizes = cases[0].op == "quantize"
    row = Row(name, target, "executed", 0, max_error=None if quantizes else 0.0)
    count = 0
    with small_tiles(split), executing(worker, target) as log:
        for case in cases:
            failure, error = conformance.check(kernel, case)
            row.cases += 1
            if failure:
                row.fault = f"{failure.case}: at {failure.coordinate} got {failure.got}, want {failure.want}"
                break
            if quantizes:
                count += case.m * case.k
            else:
                row.max_error = max(row.max_error or 0.0, error)
    row.equal_bytes = f"{count} of {count}" if quantizes and not row.fault else None
    row.dpas = sum(launch["dpas"] for launch in log.launches) or None
    row.seconds = round(sum(launch["compile_s"] + launch["build_s"] + launch["run_s"] for launch in log.launches), 1)
    if not log.launches and not row.fault:
        row.fault = "nothing was launched"
    return row


# -- the codec, on every value ------------------------------------------------------------------------------------


def every_value() -> torch.Tensor:
    """All 65536 bf16 values as fp32, and the fp32 neighbours of every tie of E4M3FN: `[258, 256 …]`."""
    bits = torch.arange(65536, dtype=torch.int32)
    coarse = (bits << 16).view(F32)
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([ties.nextafter(torch.tensor(x)) for x in (torch.inf, -torch.inf)] + [ties, -ties])
    return torch.cat([coarse, near, torch.zeros(-len(near) % 1024)]).reshape(-1, 1024)


def encode_all(worker: Worker, target: str, element: str, *, native: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes that the target's code gives for `every_value`, the definition's), by the quantizer with scale 1."""
    x = every_value()
    fmt = get_format(f"{element}_tensor")
    one = torch.ones(1, 1)
    held = capability.native_cast
    if native:
        capability.native_cast = lambda platform, element: True
    try:
        with executing(worker, target):
            got = quantize.quantize(x, fmt, platform_of(target), scale=one)
    finally:
        capability.native_cast = held
    want = reference.quantize(x, fmt, scale=one)
    return got.data.view(torch.uint8), want.data.view(torch.uint8)


def decode_all(worker: Worker, target: str, element: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the target's code makes of all 256 bytes, what they mean), NaN as 12345."""
    from blockscale.kernels.triton import gemm_kernels

    codes = torch.arange(256, dtype=torch.uint8)
    got = torch.empty(256, dtype=dtype)
    with executing(worker, target):
        gemm_kernels.decode_kernel[(1,)](codes, got, 256, KIND=element, BLOCK=256)
    want = codes.view(get_format(f"{element}_tensor").element.dtype).float()
    return got.float().nan_to_num(12345.0), want.nan_to_num(12345.0)


# -- what ships, compiled -----------------------------------------------------------------------------------------


def shipped(target: str) -> dict[str, list[dict[str, Any]]]:
    """Launches with the tiles that `tuning` chooses for a layer of DeepSeek-V3: recorded, not run."""
    platform = platform_of(target)

    def weight(name: str, n: int, k: int, experts: int = 0) -> Any:
        from blockscale.tensor import BlockScaled

        fmt, lead = get_format(name), (experts,) if experts else ()
        data = torch.empty(*lead, *fmt.data_shape(n, k), dtype=fmt.element.dtype)
        scale = torch.empty(*lead, *fmt.scale_shape(n, k), dtype=fmt.scale_dtype)
        return BlockScaled.trusted(data, scale, fmt, "row", (*lead, n, k))

    from blockscale.numerics import get_numerics

    bf16 = torch.bfloat16
    x, w = torch.empty(4096, 2048, dtype=bf16), weight(W8A8, 576, 2048)
    experts, ends = weight("mxfp4", 512, 2048, 8), torch.empty(8, dtype=torch.int32)
    calls = {
        "quantize 1x128": lambda: quantize.quantize(x, get_format("fp8_1x128"), platform, layout="tma"),
        "linear w8a8 M=4096": lambda: gemm.linear(x, w, None, get_numerics("deepseek_v3"), bf16, platform),
        "linear w8a8 M=1": lambda: gemm.linear(x[:1], w, None, get_numerics("deepseek_v3"), bf16, platform),
        "linear w8a16 M=4096": lambda: gemm.linear(x, w, None, get_numerics("weight_only"), bf16, platform),
        "grouped mxfp4 w4a16": lambda: grouped.grouped_linear(
            x, experts, ends, get_numerics("weight_only"), bf16, platform
        ),
    }
    found = {}
    for name, call in calls.items():
        with executing(None, target) as log:
            call()
        found[name] = log.requests[-1:]  # the quantizer before a multiplication is a line of its own
    return found
