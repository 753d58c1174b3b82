"""The operands of a case and what must come out, on the CPU and in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import reference
from ..layouts import decode_scale
from ..numerics import DEFAULT_FLOOR
from ..tensor import BlockScaled
from .cases import Case

SWIGLU_LIMIT = 2.0
RMS_EPS = 1e-6
TOP_K = 2
"""Experts of a row in gathered_linear."""


@dataclass(frozen=True)
class Operands:
    """Inputs of one case. Which are used depends on the op."""

    x: Tensor
    w: BlockScaled | None = None
    bias: Tensor | None = None
    where: Tensor | None = None
    dense: Tensor | None = None
    scale: Tensor | None = None
    floor: float = DEFAULT_FLOOR


@dataclass(frozen=True)
class Expected:
    """value: fp64 `[M, N]`. magnitude: sum of |x| |w| (and |bias|), what rounding errors are relative to."""

    value: Tensor
    magnitude: Tensor


def make(case: Case) -> Operands:
    """Random operands, the same for the same case everywhere."""
    g = torch.Generator().manual_seed(case.seed)
    width = {"swiglu_quantize": 2 * case.k}.get(case.op, case.k)
    x = _edge_rows(_spread(torch.randn(case.m, width, generator=g), g), case.edge, g).to(case.x_dtype)
    if case.op == "dense_linear":
        dense = torch.randn(case.n, case.k, generator=g).to(case.x_dtype)
        return Operands(x, dense=dense, bias=_bias(case, g))
    if case.op == "rmsnorm_quantize":
        return Operands(x, dense=torch.rand(case.k, generator=g).to(case.x_dtype))
    if case.op == "swiglu_quantize":
        return Operands(x, dense=None if case.edge == "bare" else torch.rand(case.m, generator=g))
    fmt = case.fmt
    assert fmt is not None
    if case.op == "quantize":
        scale = None
        if case.edge in ("static", "saturate"):
            like = torch.randn(case.m, case.k, generator=g) * 3 if case.edge == "static" else x / 16
            scale = reference.quantize(like, fmt).scale
        return Operands(x, scale=scale)
    lead = (case.groups,) if case.groups else ()
    w = reference.quantize(_spread(torch.randn(*lead, case.n, case.k, generator=g), g), fmt)
    return Operands(x, _edge_weight(w, case.edge, g), _bias(case, g), _where(case, g) if case.groups else None)


def _bias(case: Case, g: torch.Generator) -> Tensor | None:
    return torch.randn(case.n, generator=g).to(case.x_dtype) if case.edge == "bias" else None


def _edge_weight(w: BlockScaled, edge: str, g: torch.Generator) -> BlockScaled:
    if edge == "all_codes":
        return replace(w, data=_all_codes(w, g))
    if edge == "nan_weight":
        data = w.data.view(torch.uint8).clone()
        data[..., 1, 3] = w.format.element.nan or 0
        return replace(w, data=data.view(w.data.dtype))
    if edge in ("nan_scale", "tiny_scale"):
        scale = w.scale.clone()
        if edge == "tiny_scale":
            scale.view(torch.uint8)[..., 0, 0] = 0  # E8M0: 2^-127
        elif scale.element_size() == 1:
            scale.view(torch.uint8)[..., 0, 0] = 0xFF if scale.dtype == torch.float8_e8m0fnu else 0x7F
        else:
            scale[..., 0, 0] = torch.nan
        return replace(w, scale=scale)
    if edge in ("f32_scales", "bf16_scales"):
        return replace(w, scale=decode_scale(w.scale).to(torch.float32 if edge == "f32_scales" else torch.bfloat16))
    return w


def expected(case: Case, o: Operands, multiplied: Tensor | None = None) -> Expected:
    """What a multiplying op must give, by the definition, before its result is rounded.

    multiplied: fp32 `[M, K]`, what a kernel with a quantizer of its own multiplies instead of the definition's.
    """
    if case.op == "dense_linear":
        assert o.dense is not None
        return _product(o.x, o.dense, o.bias)
    assert o.w is not None
    if not case.groups:
        x = reference.activations(o.x, o.w, case.policy) if multiplied is None else multiplied
        return _product(x, reference.dequantize(o.w), o.bias)
    value = torch.zeros(case.m * (TOP_K if case.op == "gathered_linear" else 1), case.n, dtype=torch.float64)
    magnitude = torch.zeros_like(value)
    for expert, rows in enumerate(_rows_by_expert(case, o)):
        if len(rows):
            w, of_x = o.w[expert], rows // TOP_K if case.op == "gathered_linear" else rows
            x = reference.activations(o.x[of_x], w, case.policy) if multiplied is None else multiplied[of_x]
            part = _product(x, reference.dequantize(w), None)
            value[rows], magnitude[rows] = part.value, part.magnitude
    return Expected(value, magnitude)


def _rows_by_expert(case: Case, o: Operands) -> list[Tensor]:
    """Rows of the result that each expert computes, by `o.where`."""
    assert o.where is not None
    if case.op == "gathered_linear":
        return [(o.where.flatten() == e).nonzero().flatten() for e in range(case.groups)]
    if case.op == "masked_linear":
        capacity = case.m // case.groups
        return [e * capacity + torch.arange(count) for e, count in enumerate(o.where.tolist())]
    ends = [0, *o.where.tolist()]
    return [torch.arange(ends[e], max(ends[e], ends[e + 1])) for e in range(case.groups)]


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Expected:
    x, w = x.double(), w.double()
    value, magnitude = x @ w.mT, x.abs() @ w.abs().mT
    if bias is not None:
        value, magnitude = value + bias.double(), magnitude + bias.double().abs()
    return Expected(value, magnitude)


def _spread(x: Tensor, g: torch.Generator) -> Tensor:
    """Give every row and every 16 columns a magnitude of their own, so that a wrong scale cannot hide."""
    rows, cols = x.shape[-2:]
    by_row = torch.rand(rows, 1, generator=g) * 4 - 2
    by_col = (torch.rand(-(-cols // 16), generator=g) * 4 - 2).repeat_interleave(16)[:cols]
    return x * torch.exp2(by_row + by_col)


def _edge_rows(x: Tensor, edge: str, g: torch.Generator) -> Tensor:
    if edge == "zeros":
        return torch.zeros_like(x)
    if edge == "zero_row":
        x[0] = 0
    elif edge == "tiny":
        x[0] *= 1e-13  # below the floor
        x[-1] *= 1e-38  # subnormal in fp32
    elif edge == "large":
        x[0] *= 1e25
    elif edge == "nan_row":
        x[1, 3] = torch.nan
    elif edge == "nonfinite":
        x[0, 1], x[1, 200], x[2, 0] = torch.nan, torch.inf, -torch.inf
    elif edge == "ties":  # values halfway between neighbours of every element type, under a scale of a power of two
        grid = torch.arange(x.numel()).reshape(x.shape) % 448
        x = torch.where(grid == 0, torch.tensor(448.0), grid + 0.5) * torch.where(
            torch.rand(x.shape, generator=g) < 0.5, -1, 1
        )
        x[:, ::32] = 448.0
    return x


def _all_codes(w: BlockScaled, g: torch.Generator) -> Tensor:
    """Random bytes over every finite code, subnormals and both zeros included."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[codes.view(w.format.element.dtype).float().isfinite()]
    pick = torch.randint(len(finite), w.data.shape, generator=g)
    return finite[pick].view(w.format.element.dtype)


def _where(case: Case, g: torch.Generator) -> Tensor:
    """Which expert gets which rows; see each op. The second expert gets none.

    grouped_linear: end rows; edges: all rows in one; rows past the last. masked_linear: counts, all and none among
    them. gathered_linear: ids, two a row, of no expert among them.
    """
    experts = case.groups
    if case.op == "gathered_linear":
        ids = torch.randint(-1, experts + 1, (case.m, TOP_K), generator=g, dtype=torch.int32)
        return torch.where(ids == 1, 0, ids).int()
    if case.op == "masked_linear":
        counts = torch.randint(0, case.m // experts + 1, (experts,), generator=g, dtype=torch.int32)
        counts[1], counts[-1] = 0, case.m // experts
        return counts
    if case.edge == "one_expert":
        return torch.tensor([0] * 3 + [case.m] * (experts - 3), dtype=torch.int32)
    ends = torch.randint(0, case.m + 1, (experts,), generator=g).sort().values
    ends[0], ends[-1] = min(1, case.m), case.m
    ends[1] = ends[0]
    if case.edge == "padded":
        ends = ends.clamp(max=case.m - 4)
    return ends.sort().values.to(torch.int32)
