"""Conversions that change no value: another scale dtype, finer blocks, a wider element.

Every one is checked, block by block, in fp64: a product of an element (at most 4 significant bits) and an fp32 scale
is exact there. What cannot be done exactly is not done here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import Format
from ..layouts import decode_scale, encode_e8m0
from ..numerics import DEFAULT_FLOOR
from ..reference import block_amax, decode, encode, from_blocks, pack_fp4, round_scale, to_blocks
from ..tensor import BlockScaled


def convert_exact(q: BlockScaled, fmt: Format) -> BlockScaled | None:
    """`q: [rows, cols]` in another format with exactly the same values, or None when that cannot be.

    Scales come back in fp32 (in `fmt`'s storage dtype for E8M0 and E4M3).
    """
    if fmt.name == q.format.name:
        return q
    if fmt.two_level != q.format.two_level:
        return None  # a second level cannot be invented, or folded, without rounding scales
    for scale in _scales_to_try(q, fmt):
        if _storable(scale, fmt) and (new := _with_scale(q, scale, fmt)) is not None:
            return new
    return None


def _with_scale(q: BlockScaled, scale: Tensor, fmt: Format) -> BlockScaled | None:
    """The same values with these scales, or None when an element is not exact in them."""
    if fmt.element == q.format.element and _nested(q.format, fmt, q.shape[-2:]):
        return BlockScaled(q.data, _stored(scale, fmt), fmt, shape=q.shape, global_scale=q.global_scale)
    value = values(q)
    step = scale.double()[..., None, :, None]
    codes = encode((to_blocks(value, fmt) / step).float(), fmt)
    back = from_codes(codes, fmt).double() * step
    rows, cols = q.shape[-2:]
    if not torch.equal(back.flatten(-2).flatten(-3, -2)[..., :rows, :cols], value):
        return None
    return BlockScaled(from_blocks(codes, q.shape, fmt), _stored(scale, fmt), fmt, shape=q.shape)


def values(q: BlockScaled) -> Tensor:
    """`data * scale` in fp64, exactly: `[..., rows, cols]`."""
    rows, cols = q.shape[-2:]
    br, bc = q.format.block_shape(rows, cols)
    scale = decode_scale(q.scale).double()
    if q.global_scale is not None:
        scale = scale * q.global_scale.double().reshape(*q.global_scale.shape, 1, 1)
    scale = scale.repeat_interleave(br, -2)[..., :rows, :].repeat_interleave(bc, -1)[..., :cols]
    return decode(q.data, q.format)[..., :cols].double() * scale


def errors(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Sums of squares of `x - y` and of `x`, both fp64, and the largest difference. Equal infinities and NaN on both
    sides do not differ; NaN on one side differs infinitely."""
    if not x.numel():
        return 0.0, 0.0, 0.0
    x, y = x.reshape(-1), y.reshape(-1)
    difference = x - y
    error, power, worst = float(difference.dot(difference)), float(x.dot(x)), float(difference.abs().max())
    if math.isfinite(error + power + worst):
        return error, power, worst
    unequal_nan = x.isnan() != y.isnan()
    difference = torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(0.0, posinf=math.inf)
    difference = torch.where(unequal_nan, math.inf, difference)
    power = float(torch.where(x.isfinite(), x, 0.0).square().sum())
    return float(difference.square().sum()), power, float(difference.max())


def from_codes(codes: Tensor, fmt: Format) -> Tensor:
    """Element codes, one a byte, to fp32."""
    if not fmt.packed:
        return codes.view(fmt.element.dtype).float()
    return decode(pack_fp4(codes), fmt)[..., : codes.shape[-1]]


def _nested(old: Format, new: Format, shape: tuple[int, ...]) -> bool:
    """Whether every new block lies inside one old block."""
    (r0, c0), (r1, c1) = old.block_shape(*shape[-2:]), new.block_shape(*shape[-2:])
    rows_fit = r0 % r1 == 0 or r0 >= shape[-2]
    cols_fit = c0 % c1 == 0 or c0 >= shape[-1]
    return rows_fit and cols_fit


def _scales_to_try(q: BlockScaled, fmt: Format) -> Iterator[Tensor]:
    """Scales for each new block in which its values may be exact, the likeliest first.

    For a narrower element with powers of two as scales there is one that is exact if any is: that of the largest
    value. Twice as much has coarser steps, half as much does not reach. It is also the one that OCP's rule gives, so
    MXFP4 made by that rule comes back byte for byte out of FP8.
    """
    if fmt.scale_rounding != "none" and fmt.max < q.format.max:
        amax = block_amax(to_blocks(values(q).float(), fmt)).clamp(min=DEFAULT_FLOOR)
        yield round_scale(amax, fmt, "pow2_floor")
    yield _scale_per_block(q, fmt)


def _scale_per_block(q: BlockScaled, fmt: Format) -> Tensor:
    """One scale for each new block that its values may be exact multiples in: fp32 `[..., grid rows, grid cols]`.

    Inside one old block that is the old scale. A block that joins several takes their largest, lowered by a power of
    two where the new element has room above the old one's largest (E2M1's 6 in E4M3's 448), which keeps small blocks
    out of the subnormals. That is DeepSeek's own rule for MXFP4 in 128x128 tiles.
    """
    rows, cols = q.shape[-2:]
    old = decode_scale(q.scale)
    br, bc = q.format.block_shape(rows, cols)
    if _nested(q.format, fmt, (rows, cols)):
        full = old.repeat_interleave(br, -2)[..., :rows, :].repeat_interleave(bc, -1)[..., :cols]
        nr, nc = fmt.block_shape(rows, cols)
        return full[..., ::nr, ::nc].contiguous()
    full = old.repeat_interleave(br, -2)[..., :rows, :].repeat_interleave(bc, -1)[..., :cols]
    largest = to_blocks(full, fmt).amax((-3, -1))
    room = int(torch.tensor(fmt.max / q.format.max).log2().floor())
    return largest * 2.0**-room if room > 0 else largest


def _storable(scale: Tensor, fmt: Format) -> bool:
    if not bool((scale.isfinite() & (scale > 0)).all()):
        return fmt.scale_rounding == "none" and bool(scale.isfinite().all())
    if fmt.scale_rounding == "none":
        return True
    return bool((torch.frexp(scale)[0] == 0.5).all()) and bool((scale <= 2.0**127).all() and (scale >= 2.0**-127).all())


def _stored(scale: Tensor, fmt: Format) -> Tensor:
    if fmt.two_level:
        return scale.to(torch.float8_e4m3fn)
    return encode_e8m0(scale) if fmt.scale_dtype == torch.float8_e8m0fnu else scale
