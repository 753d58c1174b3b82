"""What is tried: ops × formats × ragged shapes × dtypes × edge values. Plain data, no device touched."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..formats import FORMATS, Format, get_format
from ..numerics import Numerics, get_numerics
from ..registry import Problem

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

SHAPES = (
    (1, 64, 128), (2, 17, 32), (3, 192, 576), (5, 129, 200), (33, 320, 256), (64, 256, 256), (70, 576, 384),
    (130, 130, 1000), (4, 96, 4096),
)  # fmt: skip
"""(M, N, K): one row, less than a block, odd rows, every dimension ragged against 32, 64 and 128, a square grid of
scales, one past each tile, a long sum."""
QUANTIZE_SHAPES = ((1, 128), (3, 576), (4, 512), (7, 200), (129, 320), (256, 1024))
"""(rows, cols); one has as many rows as groups of 128."""
WEIGHTS = (
    "fp8_128x128", "fp8_128x128_ue8m0", "fp8_32x32_ue8m0", "fp8_1x128", "fp8_row", "fp8_tensor",
    "fp8e5m2_128x128", "fp8fnuz_128x128", "mxfp8", "mxfp4", "nvfp4",
)  # fmt: skip
X_EDGES = ("zero_row", "tiny", "large", "nan_row", "strided", "offset", "transposed")
"""What x holds and how it lies: columns of a wider tensor, one element past an aligned address, transposed."""
W_EDGES = ("all_codes", "nan_weight", "nan_scale", "tiny_scale", "f32_scales", "bf16_scales")
"""Every finite code; a NaN code; a NaN scale; 2^-127, E8M0's byte 0; scales stored in another dtype."""
QUANTIZE_EDGES = (
    "zeros", "tiny", "ties", "nonfinite", "static", "saturate", "strided", "offset", "transposed",
)  # fmt: skip
LAYOUTS = ("row", "col_scales", "tma", "ue8m0x4")
WEIGHT_LAYOUTS = ("kn", "col_scales", "tma", "ue8m0x4", "fnuz")


@dataclass(frozen=True)
class Case:
    """One problem with its operands.

    n is 0 for quantize ops; groups is the number of experts of a grouped op. layout: of the weight, of a quantize op's
    result, of matmul's x. edge: what is special about the operands (`operands.make`).
    """

    op: str
    format: str | None
    m: int
    n: int
    k: int
    x_dtype: torch.dtype = BF16
    numerics: str = "checkpoint"
    edge: str = "plain"
    layout: str = "row"
    groups: int = 0

    @property
    def fmt(self) -> Format | None:
        return get_format(self.format) if self.format else None

    @property
    def policy(self) -> Numerics:
        return get_numerics(self.numerics)

    @property
    def seed(self) -> int:
        """Fixed by the case itself, so a failure can be repeated alone."""
        return zlib.crc32(str(self).encode())

    def problem(self) -> Problem:
        static = self.edge in ("static", "saturate")
        x_format = self.policy.activation_format(self.fmt) if self.op == "matmul" and self.fmt else None
        x_dtype = x_format.element.dtype if x_format else self.x_dtype
        w_dtype = self.x_dtype if self.op == "dense_linear" else None
        return Problem(
            self.op, self.n, self.k, x_dtype, self.fmt, "row" if self.op == "matmul" else self.layout, self.x_dtype,
            self.policy, self.groups, static,
            x_format=x_format, x_layout=self.layout if self.op == "matmul" else "row", w_dtype=w_dtype,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Fields as JSON holds them."""
        return {**asdict(self), "x_dtype": str(self.x_dtype).removeprefix("torch.")}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        """Undo `to_json`."""
        return cls(**{**fields, "x_dtype": getattr(torch, fields["x_dtype"])})

    def __str__(self) -> str:
        dtype = str(self.x_dtype).removeprefix("torch.")
        experts = f" E={self.groups}" if self.groups else ""
        shape = f"M={self.m}{experts} N={self.n} K={self.k}" if self.n else f"rows={self.m} cols={self.k}"
        tail = "" if self.layout == "row" else f" {self.layout}"
        return f"{self.op} {self.format or ''} {shape} {dtype} {self.numerics} {self.edge}{tail}"


def cases(*, quick: bool = False) -> Iterator[Case]:
    """Every case. quick: one shape and edge of each kind, for `doctor` and smoke tests."""
    yield from _linear("linear", quick)
    yield from _int16(quick)
    yield from _matmul(quick)
    yield from _grouped(quick)
    yield from _quantize(quick)
    yield from _fused(quick)
    yield from _dense(quick)
    if quick:
        yield from _whole()


def _whole() -> Iterator[Case]:
    """Whole blocks of 128, for kernels that take nothing else: the other quick cases are ragged."""
    for policy in ("checkpoint", "weight_only"):
        yield Case("linear", "fp8_128x128", 3, 256, 384, numerics=policy)
        yield Case("grouped_linear", "fp8_128x128", 9, 256, 384, numerics=policy, groups=5)
    yield Case("grouped_linear", "mxfp4", 9, 256, 384, numerics="weight_only", groups=5)
    yield Case("matmul", "fp8_128x128", 3, 256, 384)
    for name in ("fp8_1x128", "fp8_row", "fp8_tensor"):
        yield Case("quantize", name, 3, 0, 384)


def _fits(fmt: Format, k: int) -> bool:
    return not fmt.packed or k % 2 == 0


def _packs(fmt: Format, layout: str) -> bool:
    """Whether a tensor of this format can lie in this layout."""
    need = {"tma": fmt.scale_dtype == F32, "ue8m0x4": fmt.scale_dtype == torch.float8_e8m0fnu}
    return need.get(layout, True) and (layout != "fnuz" or fmt.element.name == "fp8") and not fmt.two_level


def _stored(fmt: Format, edge: str) -> bool:
    """Whether a weight of this format can have this edge."""
    if edge in ("tiny_scale", "f32_scales"):
        return fmt.scale_dtype == torch.float8_e8m0fnu
    if edge == "bf16_scales":
        return not fmt.two_level
    return fmt.element.nan is not None or edge not in ("all_codes", "nan_weight")


def _linear(op: str, quick: bool) -> Iterator[Case]:
    for name in WEIGHTS[:1] if quick else WEIGHTS:
        fmt = get_format(name)
        for policy in ("checkpoint", "weight_only"):
            for m, n, k in SHAPES[2:3] if quick else SHAPES:
                if _fits(fmt, k):
                    yield Case(op, name, m, n, k, numerics=policy)
            for dtype in () if quick else (F16, F32):
                yield Case(op, name, 3, 192, 576, dtype, policy)
            for edge in () if quick else ("bias", *X_EDGES, *W_EDGES):
                if edge not in W_EDGES or _stored(fmt, edge):
                    yield Case(op, name, 5, 130, 384, F32, policy, edge)
            for layout in () if quick else WEIGHT_LAYOUTS:
                if _packs(fmt, layout):
                    yield Case(op, name, 5, 130, 384, numerics=policy, layout=layout)
    if not quick:
        for edge in X_EDGES[-3:]:
            yield Case(op, "fp8_128x128", 70, 256, 512, edge=edge)
        for policy in ("deepseek_v3", "deepseek_v4"):
            yield Case(op, "fp8_128x128_ue8m0", 33, 320, 576, numerics=policy)
        for m in (2, 4, 8, 16, 32, 64, 65, 129, 257):  # the borders of every kernel's M range
            yield Case(op, "fp8_128x128", m, 256, 512)
        for name in ("fp8_128x128", "fp8_32x32_ue8m0", "mxfp4", "nvfp4"):  # so many that weights are decoded beforehand
            yield Case(op, name, 513, 192, 576)


def _int16(quick: bool) -> Iterator[Case]:
    """Multiplication in 16-bit fixed point, where the numerics allow it: `cpu.int16`, from 8 rows on."""
    for name in () if quick else ("fp8_128x128", "fp8_128x128_ue8m0", "fp8_1x128", "fp8_row", "fp8_tensor"):
        for policy in ("checkpoint,int16=True", "weight_only,int16=True"):
            for m, n, k in ((8, 129, 200), (33, 320, 256), (70, 576, 384), (130, 130, 1000)):
                yield Case("linear", name, m, n, k, F32, policy)
            for edge in ("bias", *X_EDGES, *W_EDGES):
                if edge not in W_EDGES or _stored(get_format(name), edge):
                    yield Case("linear", name, 9, 130, 384, F32, policy, edge)
            for dtype in (BF16, F16):
                yield Case("linear", name, 9, 192, 576, dtype, policy)


def _matmul(quick: bool) -> Iterator[Case]:
    names = ("fp8_128x128", "fp8_128x128_ue8m0", "fp8_32x32_ue8m0", "fp8_row", "fp8_tensor", "mxfp8", "mxfp4", "nvfp4")
    for name in names[:1] if quick else names:
        fmt = get_format(name)
        for m, n, k in SHAPES[2:3] if quick else SHAPES:
            if _fits(fmt, k):
                yield Case("matmul", name, m, n, k)
        for dtype in () if quick else (F16, F32):
            yield Case("matmul", name, 3, 192, 576, dtype)
        for edge in () if quick else ("zero_row", "tiny", "nan_row", *W_EDGES):
            if edge not in W_EDGES or _stored(fmt, edge):
                yield Case("matmul", name, 5, 130, 384, edge=edge)
        x_format = get_numerics("checkpoint").activation_format(fmt)
        for layout in () if quick else LAYOUTS[1:]:
            if x_format and _packs(x_format, layout):
                yield Case("matmul", name, 7, 192, 576, layout=layout)


def _grouped(quick: bool) -> Iterator[Case]:
    names = ("fp8_128x128", "fp8_128x128_ue8m0", "fp8_32x32_ue8m0", "fp8_row", "mxfp8", "mxfp4", "nvfp4")
    for name in names[:1] if quick else names:
        fmt = get_format(name)
        for policy in ("checkpoint", "weight_only"):
            for m, n, k in ((9, 192, 384),) if quick else ((1, 128, 256), (9, 192, 384), (140, 320, 576)):
                yield Case("grouped_linear", name, m, n, k, numerics=policy, groups=5)
            for dtype in () if quick else (F16, F32):
                yield Case("grouped_linear", name, 9, 192, 384, dtype, policy, groups=5)
            for edge in () if quick else ("padded", "one_expert", "nan_row", "zero_row", "strided", "offset", *W_EDGES):
                if edge not in W_EDGES or _stored(fmt, edge):
                    yield Case("grouped_linear", name, 21, 130, 384, numerics=policy, edge=edge, groups=5)
            for edge in ("plain",) if quick else ("plain", "nan_row", *W_EDGES):
                if edge not in W_EDGES or _stored(fmt, edge):
                    yield Case("masked_linear", name, 30, 130, 384, numerics=policy, edge=edge, groups=5)
                    yield Case("gathered_linear", name, 9, 130, 384, numerics=policy, edge=edge, groups=5)
            if not quick:
                yield Case("masked_linear", name, 350, 192, 576, numerics=policy, groups=5)
                yield Case("gathered_linear", name, 1, 192, 576, F16, policy, groups=5)


def _quantize(quick: bool) -> Iterator[Case]:
    for name in ("fp8_1x128", "fp8_128x128") if quick else FORMATS:
        fmt = get_format(name)
        for rows, cols in QUANTIZE_SHAPES[1:2] if quick else QUANTIZE_SHAPES:
            yield Case("quantize", name, rows, 0, cols)
        for dtype in () if quick else (F16, F32):
            yield Case("quantize", name, 3, 0, 576, dtype)
        for edge in () if quick else QUANTIZE_EDGES:
            yield Case("quantize", name, 5, 0, 384, F32, edge=edge)
        for layout in () if quick else LAYOUTS[1:]:
            if _packs(fmt, layout):
                yield Case("quantize", name, 7, 0, 576, layout=layout)


def _fused(quick: bool) -> Iterator[Case]:
    for op in ("swiglu_quantize", "rmsnorm_quantize"):
        for name in ("fp8_1x128",) if quick else ("fp8_1x128", "fp8_1x128_ue8m0", "fp8_1x32_ue8m0", "fp8_row", "mxfp8"):
            for rows, cols in ((3, 384),) if quick else ((1, 128), (3, 576), (130, 1024)):
                yield Case(op, name, rows, 0, cols)
            for dtype in () if quick else (F16, F32):
                yield Case(op, name, 3, 0, 576, dtype)
            for edge in () if quick else ("zero_row", "nan_row", "strided", "offset", "bare"):
                yield Case(op, name, 5, 0, 384, edge=edge)
            for layout in () if quick else LAYOUTS[1:]:
                if _packs(get_format(name), layout):
                    yield Case(op, name, 7, 0, 576, layout=layout)


def _dense(quick: bool) -> Iterator[Case]:
    for dtype in (F32,) if quick else (F32, BF16, F16):
        for m, n, k in SHAPES[2:3] if quick else SHAPES:
            yield Case("dense_linear", None, m, n, k, dtype)
        for edge in () if quick else ("bias", "zero_row", "nan_row", "strided", "offset", "transposed"):
            yield Case("dense_linear", None, 3, 130, 384, dtype, edge=edge)
