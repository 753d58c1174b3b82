"""`cpu.slices`: FP8 linear in plain torch, for machines without our native library. Weights stay FP8 in memory.

A few hundred rows of the weight at a time become fp32, exactly, and go through `torch.mm`. The scratch memory is one
slice, whatever the size of the layer. From about 64 rows of x on this runs at the speed of torch's own fp32 matmul;
for one row the decoding dominates, which only native code can cure.

Decoding avoids torch's FP8 casts (about 0.2 GB/s on a core): an E4M3 byte, sign-extended to 16 bits, shifted left by 7
and masked, is the fp16 number of its value / 256, subnormals included; an E5M2 byte is the upper half of an fp16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import DtypeError, ShapeError
from ...formats import Element
from ...layouts import decode_scale
from ...numerics import Numerics
from ...reference import activations
from ...tensor import BlockScaled

SLICE_ELEMENTS = 1 << 20
"""Weights decoded at a time: 4 MB of fp32. Smaller slices make narrow matmuls, larger ones fall out of the cache."""

_MIN_ROWS = 32

_HALF = {"fp8": (7, -16512, 256.0), "fp8fnuz": (7, -16512, 128.0), "fp8e5m2": (8, -256, 1.0)}
"""element: (left shift of the sign-extended byte, mask, factor). The fp16 number times the factor is the value.
-16512 is 0xBF80, -256 is 0xFF00."""


def linear(x: Tensor, w: BlockScaled, bias: Tensor | None, numerics: Numerics, out_dtype: torch.dtype) -> Tensor:
    """`x: [M, K]`, `w: [N, K]` FP8 in layout "row" -> `[M, N]` in `out_dtype`; fp32 sums.

    Raises ShapeError when x and w do not fit, DtypeError for weights that are not FP8.
    """
    if x.dim() != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1]:
        raise ShapeError(f"cpu.slices: needs x [M, K] and w [N, K], got {list(x.shape)} and {list(w.shape)}")
    if w.format.element.name not in _HALF:
        raise DtypeError(f"cpu.slices: needs FP8 weights, got {w.format}")
    x = activations(x, w, numerics)
    rows, cols = w.shape
    y = torch.empty(x.shape[0], rows)
    height = min(rows, max(_MIN_ROWS, SLICE_ELEMENTS // cols))
    scale, factor = _fold(decode_scale(w.scale), _HALF[w.format.element.name][2])
    half = torch.empty(height, cols, dtype=torch.int16)
    dense = torch.empty(height, cols)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        part = dense[: stop - start]
        _decode(w.data[start:stop], w.format.element, half[: stop - start], part)
        if factor != 1:
            part *= factor
        _apply_scale(part, scale, start, w)
        torch.mm(x, part.T, out=y[:, start:stop])
    if bias is not None:
        y += bias.float()
    return y.to(out_dtype)


def _fold(scale: Tensor, factor: float) -> tuple[Tensor, float]:
    """The factor inside the scales, which is exact and saves a pass; apart where a scale would overflow."""
    folded = scale * factor
    if bool((folded.isinf() & scale.isfinite()).any()):
        return scale, factor
    return folded, 1.0


def _decode(data: Tensor, element: Element, half: Tensor, out: Tensor) -> None:
    """FP8 `data: [rows, cols]` to fp32 `out`, exactly but for the element's factor; `half`: int16 scratch."""
    shift, mask, _ = _HALF[element.name]
    byte = data.view(torch.int8)
    half.copy_(byte)
    half.mul_(1 << shift).bitwise_and_(mask)
    out.copy_(half.view(torch.float16))
    if element.name == "fp8e5m2":
        return  # an fp16 carries the infinities and NaNs of E5M2 itself
    fnuz = element.name == "fp8fnuz"
    if (byte.amin() == -128) if fnuz else ((byte & 0x7F).amax() == 0x7F):
        # Rare, so a cheap question first: torch compares bytes slowly.
        out.masked_fill_(byte == -128 if fnuz else (byte & 0x7F) == 0x7F, torch.nan)


def _apply_scale(part: Tensor, scale: Tensor, start: int, w: BlockScaled) -> None:
    """Multiply `part`, rows `start …` of w as fp32, by the scales `[grid rows, grid cols]` of their blocks."""
    br, bc = w.format.block_shape(*w.shape)
    scale = scale[torch.arange(start, start + part.shape[0]) // br]
    whole = part.shape[1] // bc
    if whole:
        blocks = part[:, : whole * bc].unflatten(1, (whole, bc))  # type: ignore[no-untyped-call]
        blocks.mul_(scale[:, :whole, None])
    if whole < scale.shape[1]:  # the ragged last block
        part[:, whole * bc :].mul_(scale[:, whole:])
