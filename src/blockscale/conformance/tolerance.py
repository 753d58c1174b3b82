"""What may differ from the definition: sums by a bound, quantizers by the `QuantizerTolerance` that they declare."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layouts, reference
from ..formats import Format
from ..registry import QuantizerTolerance
from ..tensor import BlockScaled

Found = tuple[list[int] | None, str, str, float]
"""First or worst wrong coordinate (None: all right), what is there, what should be, error over its bound."""


U = 2.0**-24
"""fp32's unit roundoff."""


def product_bound(
    value: Tensor, magnitude: Tensor, roundings: int, dtype: torch.dtype, accumulation_error: float
) -> Tensor:
    """How far each element of a product may be from `value`, fp64 `[M, N]`: `conformance.compare` says why.

    magnitude: Σ |x| |w|, `[M, N]`. roundings: fp32 roundings that a term can meet, its sum's included: K and a few.
    dtype: of the result. accumulation_error: what the kernel declares, relative to `magnitude`.
    """
    info, gamma = torch.finfo(dtype), roundings * U / (1 - roundings * U)
    return value.abs() * info.eps / 2 + magnitude * (gamma + accumulation_error) + info.tiny


def beyond(
    tolerance: QuantizerTolerance, got: BlockScaled, x: Tensor, fmt: Format, given: Tensor | None, floor: float
) -> Found:
    """The first scale or code that a declared tolerance does not cover. x: [M, K]; given: static scales."""
    got, x = layouts.convert(got, "row"), x.float()
    scale = layouts.decode_scale(got.scale)
    if given is not None:
        low = high = layouts.decode_scale(given)
    else:
        amax = reference.block_amax(reference.to_blocks(x, fmt)).clamp(min=floor)
        least = tolerance.scale_floor * fmt.max
        low, high = (
            reference.round_scale((amax * factor).clamp(min=least), fmt, fmt.scale_rounding)
            for factor in (1 - tolerance.scale_error, 1 + tolerance.scale_error)
        )
    if scale.shape != low.shape or tuple(got.data.shape) != tuple(x.shape) or got.data.dtype != fmt.element.dtype:
        have = f"data {got.data.dtype} {list(got.data.shape)}, scale {list(scale.shape)}"
        return [], have, f"data {fmt.element.dtype} {list(x.shape)}, scale {list(low.shape)}", float("inf")
    wrong = ~((scale >= low) & (scale <= high))
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        where = tuple(at)
        return (
            at,
            f"scale {scale[where].item():.9g}",
            f"{low[where].item():.9g} … {high[where].item():.9g}",
            float("inf"),
        )
    want = reference.quantize(x, fmt, scale=got.scale).data.view(torch.uint8)
    have_codes = got.data.view(torch.uint8)
    nan = want == (fmt.element.nan or 0)
    apart = (_ordered(have_codes) - _ordered(want)).abs()
    wrong = torch.where(nan, have_codes != want, apart > tolerance.codes)
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        codes = [hex(int(t[tuple(at)])) for t in (have_codes, want)]
        return at, f"code {codes[0]}", f"{codes[1]} or up to {tolerance.codes} beside", float("inf")
    return None, "", "", float(torch.where(nan, 0, apart).max()) / max(tolerance.codes, 1)


def _ordered(codes: Tensor) -> Tensor:
    """Sign-and-magnitude codes as integers in the order of their values."""
    magnitude = (codes & 0x7F).int()
    return torch.where(codes >= 0x80, -magnitude, magnitude)
