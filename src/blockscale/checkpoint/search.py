"""Scales with the least square error, by search: an option of `quantize`.

The largest magnitude of a block fixes its scale by default, and for 8-bit floats that is hard to beat: an element's
error is relative to itself. For 4-bit elements, and for heavy-tailed blocks, a smaller scale that clips the largest
element can leave less error. Each block takes the best of a few candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format
from ..layouts import decode_scale
from ..numerics import DEFAULT_FLOOR
from ..reference import block_amax, decode, encode, round_scale, store_scale, to_blocks

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Candidates relative to the scale of the largest magnitude; powers of two try the exponent and the two below."""


def searched_scale(x: Tensor, fmt: Format) -> Tensor:
    """For `x: [rows, cols]`: the scale of each block with the least sum of squared errors, stored as `fmt` does.

    Ties take the larger scale, so a block that the plain scale suits best keeps it.
    """
    blocks = torch.where(x.isfinite(), x, 0.0).float()
    blocks = to_blocks(blocks, fmt)
    first = round_scale(block_amax(blocks).clamp(min=DEFAULT_FLOOR), fmt, fmt.scale_rounding)
    ratios = RATIOS if fmt.scale_rounding == "none" else (2.0, 1.0, 0.5, 0.25)
    best, least = first, torch.full_like(first, torch.inf)
    for ratio in ratios:
        candidate = (first * ratio).clamp(min=2.0**-127)
        step = candidate[..., None, :, None]
        back = _decode(encode(blocks / step, fmt), fmt) * step
        error = (back - blocks).square().sum((-3, -1))
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    return store_scale(best, fmt) if fmt.scale_dtype == torch.float8_e8m0fnu else decode_scale(best)


def _decode(codes: Tensor, fmt: Format) -> Tensor:
    """Element codes, one a byte, to fp32."""
    if not fmt.packed:
        return codes.view(fmt.element.dtype).float()
    return decode(codes | (codes << 4), fmt)[..., ::2]
