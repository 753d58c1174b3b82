"""Scales with the least square error, by search: an option of `quantize`.

The largest magnitude of a block fixes its scale by default, and for 8-bit floats that is hard to beat: an element's
error is relative to itself. For 4-bit elements, and for heavy-tailed blocks, a smaller scale that clips the largest
element can leave less error. Each block takes the best of a few candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import decode_scale, encode_e8m0
from ..numerics import DEFAULT_FLOOR
from ..reference import block_amax, encode, round_scale, to_blocks
from .encode import Encoding
from .exact import from_codes
from .header import DTYPES

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
POWERS = (1.0, 2.0, 0.5, 0.25)
"""Candidates relative to the scale of the largest magnitude. The first, the plain one, wins ties."""


def searched_scale(x: Tensor, encoding: Encoding, global_scale: Tensor | None = None) -> Tensor:
    """For `x: [rows, cols]`: of each block the scale with the least sum of squared errors, in a dtype that `quantize`
    takes. Candidates are rounded to the storage dtype first, so what is searched is what is stored.

    global_scale: NVFP4's second level.
    """
    fmt = encoding.format
    level = 1.0 if global_scale is None else float(global_scale)
    blocks = to_blocks(torch.where(x.isfinite(), x, 0.0).float(), fmt)
    amax = block_amax(blocks)
    if fmt.two_level:
        first = amax / fmt.max / level
    else:
        first = round_scale(amax.clamp(min=DEFAULT_FLOOR), fmt, fmt.scale_rounding)
    best, least = torch.zeros_like(first), torch.full_like(first, torch.inf)
    for ratio in RATIOS if fmt.scale_rounding == "none" else POWERS:
        candidate = decode_scale(_as_stored(first * ratio, encoding))
        step = (candidate * level)[..., None, :, None]
        scaled = torch.where(step > 0, blocks / step, 0.0)
        error = (from_codes(encode(scaled, fmt), fmt) * step - blocks).square().sum((-3, -1))
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    return _as_stored(best, encoding)


def _as_stored(scale: Tensor, encoding: Encoding) -> Tensor:
    fmt = encoding.format
    if fmt.two_level:
        return scale.clamp(max=448.0).to(torch.float8_e4m3fn)
    if fmt.scale_rounding != "none":
        return encode_e8m0(scale.clamp(2.0**-127, 2.0**127))
    return scale.to(DTYPES[encoding.scale_dtype])
