"""What the executed tier tries: few cases, each of which finds a fault that others would miss.

An OpenCL build takes seconds to minutes, so launches share compiled kernels and tiles are small: 32x32x32, which
every edge below is ragged against. The kernels, their constants and their launchers are those that ship.
"""

from __future__ import annotations

import time
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
from blockscale.kernels.triton import capability, gemm, grouped, quantize, quantize_constants
from blockscale.tensor import BlockScaled
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


_QUANTIZE, _SWIGLU, _RMSNORM = family.Quantize(), family.SwigluQuantize(), family.RmsnormQuantize()
_LINEAR, _GROUPED = Linear(), GroupedLinear()
W8A8 = "fp8_128x128"
EDGES = ("nonfinite", "tiny", "ties", "zeros")


def _quantize(name: str, rows: int, cols: int, *, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Case:
    return Case("quantize", name, rows, 0, cols, dtype, **more)


def _linear(name: str, *, m: int = 35, k: int = 200, numerics: str = "checkpoint", **more: Any) -> Case:
    return Case("linear", name, m, 72, k, numerics=numerics, **more)


def _grouped(name: str, *, m: int = 37, numerics: str = "checkpoint") -> Case:
    return Case("grouped_linear", name, m, 72, 200, numerics=numerics, groups=5)


@dataclass(frozen=True)
class Line:
    """Cases that share one or two OpenCL builds. split, decode_first: of the multiplication, whatever tuning says."""

    name: str
    target: str
    kernel: Any
    cases: list[Case]
    split: int = 1
    decode_first: bool = False


EXECUTED = [
    Line("quantize 1x128", "pvc", _QUANTIZE, [
        _quantize("fp8_1x128", 5, 384, dtype=F32), *(_quantize("fp8_1x128", 5, 384, dtype=F32, edge=e) for e in EDGES),
    ]),
    Line("quantize 1x128 ragged", "dg2", _QUANTIZE, [_quantize("fp8_1x128", 3, 552)]),
    Line("quantize 1x128 tma", "bmg", _QUANTIZE, [_quantize("fp8_1x128", 7, 576, layout="tma")]),
    Line("quantize 1x128 ue8m0", "bmg", _QUANTIZE, [
        _quantize("fp8_1x128_ue8m0", 7, 576), *(_quantize("fp8_1x128_ue8m0", 5, 576, edge=e) for e in EDGES),
    ]),
    Line("quantize 1x128 ue8m0 packed", "pvc", _QUANTIZE, [_quantize("fp8_1x128_ue8m0", 7, 576, layout="ue8m0x4")]),
    Line("quantize 1x64 fp16", "pvc", _QUANTIZE, [_quantize("fp8_1x64", 5, 200, dtype=torch.float16)]),
    Line("quantize 16x32", "pvc", _QUANTIZE, [_quantize("fp8_16x32", 21, 72)]),
    Line("quantize row", "pvc", _QUANTIZE, [_quantize("fp8_row", 5, 200)]),
    Line("quantize tensor", "dg2", _QUANTIZE, [_quantize("fp8_tensor", 5, 200)]),
    Line("quantize given scales", "pvc", _QUANTIZE, [_quantize("fp8_1x128", 5, 384, dtype=F32, edge="static")]),
    Line("quantize fnuz", "pvc", _QUANTIZE, [_quantize("fp8fnuz_1x128", 5, 384, dtype=F32, edge="nonfinite")]),
    Line("quantize mxfp8", "pvc", _QUANTIZE, [
        _quantize("mxfp8", 5, 288), *(_quantize("mxfp8", 5, 288, edge=e) for e in EDGES),
    ]),
    Line("quantize mxfp4", "pvc", _QUANTIZE, [
        _quantize("mxfp4", 3, 288), *(_quantize("mxfp4", 5, 288, edge=e) for e in EDGES),
    ]),
    Line("quantize mxfp4", "dg2", _QUANTIZE, [_quantize("mxfp4", 5, 104)]),
    Line("quantize nvfp4", "bmg", _QUANTIZE, [_quantize("nvfp4", 5, 104), _quantize("nvfp4", 5, 104, edge="zeros")]),
    Line("swiglu quantize", "pvc", _SWIGLU, [Case("swiglu_quantize", "fp8_1x128", 3, 0, 384)]),
    Line("swiglu quantize ue8m0 ragged", "dg2", _SWIGLU, [Case("swiglu_quantize", "fp8_1x32_ue8m0", 5, 0, 200)]),
    Line("rmsnorm quantize", "bmg", _RMSNORM, [Case("rmsnorm_quantize", "fp8_1x128", 3, 0, 328)]),
    Line("linear w8a8", "pvc", _LINEAR, [_linear(W8A8, m=m) for m in (35, 50)]),
    Line("linear w8a8", "bmg", _LINEAR, [_linear(W8A8)]),
    Line("linear w8a8", "dg2", _LINEAR, [_linear(W8A8)]),
    Line("linear w8a8 split-K", "pvc", _LINEAR, [_linear(W8A8, m=5, k=384)], split=2),
    Line("linear w8a8 decoded first", "pvc", _LINEAR, [_linear(W8A8)], decode_first=True),
    Line("linear w8a8 fp32 edges", "pvc", _LINEAR, [
        _linear(W8A8, x_dtype=F32, edge=e) for e in ("bias", "nan_row", "all_codes", "strided")
    ]),
    Line("linear w8a8 ue8m0 32x32", "pvc", _LINEAR, [_linear("fp8_32x32_ue8m0", numerics="deepseek_v4_1")]),
    Line("linear w8a8 ue8m0 1x64", "pvc", _LINEAR, [_linear("fp8_1x64_ue8m0")]),
    Line("linear w8a8 row", "bmg", _LINEAR, [_linear("fp8_row")]),
    Line("linear w8a8 tensor", "dg2", _LINEAR, [_linear("fp8_tensor")]),
    Line("linear e5m2", "pvc", _LINEAR, [_linear("fp8e5m2_128x128")]),
    Line("linear fnuz", "dg2", _LINEAR, [_linear("fp8fnuz_128x128")]),
    Line("linear w8a16", "pvc", _LINEAR, [_linear(W8A8, numerics="weight_only")]),
    Line("linear w8a16 fp16", "dg2", _LINEAR, [_linear(W8A8, numerics="weight_only", x_dtype=torch.float16)]),
    Line("linear w8a16 ue8m0 64x64", "dg2", _LINEAR, [_linear("fp8_64x64_ue8m0", numerics="weight_only")]),
    Line("linear mxfp4 w4a8", "bmg", _LINEAR, [_linear("mxfp4", numerics="deepseek_v4")]),
    Line("linear mxfp4 w4a8 1x32", "pvc", _LINEAR, [_linear("mxfp4")]),
    Line("linear mxfp4 w4a16", "pvc", _LINEAR, [_linear("mxfp4", numerics="weight_only")]),
    Line("linear mxfp4 w4a16", "dg2", _LINEAR, [_linear("mxfp4", numerics="weight_only")]),
    Line("linear nvfp4 w4a4", "pvc", _LINEAR, [_linear("nvfp4", k=208)]),
    Line("linear nvfp4 w4a16", "bmg", _LINEAR, [_linear("nvfp4", numerics="weight_only")]),
    Line("grouped w8a8", "pvc", _GROUPED, [_grouped(W8A8, m=m) for m in (37, 9)]),
    Line("grouped w8a8", "dg2", _GROUPED, [_grouped(W8A8)]),
    Line("grouped mxfp4 w4a8", "pvc", _GROUPED, [_grouped("mxfp4", numerics="deepseek_v4")]),
    Line("grouped mxfp4 w4a16", "pvc", _GROUPED, [_grouped("mxfp4", numerics="weight_only")]),
    Line("grouped mxfp4 w4a16", "dg2", _GROUPED, [_grouped("mxfp4", numerics="weight_only")]),
    Line("grouped nvfp4 w4a4", "pvc", _GROUPED, [_grouped("nvfp4")]),
    Line("grouped nvfp4 w4a16", "bmg", _GROUPED, [_grouped("nvfp4", numerics="weight_only")]),
]  # fmt: skip


class _Off(Linear):
    def run(self, problem: Any, x: torch.Tensor, w: BlockScaled, bias: torch.Tensor | None) -> torch.Tensor:
        scale = w.scale.clone()
        scale[0, 1] *= 1 + 1 / 64
        return super().run(problem, x, replace(w, scale=scale), bias)


PLANTED = Line("planted: a scale off by 1/64 is caught", "pvc", _Off(), [_linear(W8A8)])


@contextmanager
def small_tiles(split: int = 1, *, decode_first: bool = False) -> Iterator[None]:
    """32x32x32 for multiplications (64 deep where scales of 64 are folded), two groups for quantizers."""
    held = gemm.gemm_tile, grouped.gemm_tile, quantize.quantize_tile, gemm.DECODE_FIRST

    def tile(*args: Any, **kwargs: Any) -> GemmTile:
        return replace(held[0](*args, **kwargs), bm=32, bn=32, bk=32, warps=4, stages=2, split=split, swap=False)

    gemm.gemm_tile = grouped.gemm_tile = tile
    quantize.quantize_tile = lambda *args, **kwargs: QuantizeTile(2, 1, 4, "small, for OpenCL")
    gemm.DECODE_FIRST = 1 if decode_first else held[3]
    try:
        yield
    finally:
        gemm.gemm_tile, grouped.gemm_tile, quantize.quantize_tile, gemm.DECODE_FIRST = held


def execute(worker: Worker, line: Line) -> Row:
    """Compile, run and compare all cases of one line."""
    quantizes = line.cases[0].op == "quantize"
    row = Row(line.name, line.target, "executed", 0, max_error=None if quantizes else 0.0)
    count, began = 0, time.monotonic()
    with small_tiles(line.split, decode_first=line.decode_first), executing(worker, line.target) as log:
        for case in line.cases:
            failure, error = conformance.check(line.kernel, case)
            row.cases += 1
            if failure:
                row.fault = f"{failure.case}: at {failure.coordinate} got {failure.got}, want {failure.want}"[-900:]
                break
            if quantizes:
                count += case.m * case.k
            else:
                row.max_error = max(row.max_error or 0.0, error)
    row.equal_bytes = f"{count} of {count}" if quantizes and not row.fault else None
    row.dpas = sum(launch["dpas"] for launch in log.launches) or None
    row.seconds = round(time.monotonic() - began, 1)
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
        quantize_constants._computed.cache_clear()  # it remembers the answer
    try:
        with executing(worker, target):
            got = quantize.quantize(x, fmt, platform_of(target), scale=one)
    finally:
        capability.native_cast = held
        quantize_constants._computed.cache_clear()
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
