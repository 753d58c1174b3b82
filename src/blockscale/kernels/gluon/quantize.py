"""Activations to fp8 in groups of 128, scales in the layout that the GEMMs read by TMA: one launch, one pass.

Bytes equal `reference.quantize`: IEEE divisions, round to nearest even, the sign of zero kept, non-finite values left
out of amax and stored as NaN. Scales rounded to powers of two stay fp32 here: the same values, and TMA wants them so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...formats import Format, get_format
from ...tensor import BlockScaled
from .config import ceil_div
from .launch import Launch


@triton.jit
def _divide(x, scale):
    """`x / scale` correctly rounded, in a third of an IEEE division's instructions: a quotient from the correctly
    rounded reciprocal, and one fused correction (Markstein 1990). Signs are arranged so that -0 stays -0."""
    reciprocal = tl.div_rn(1.0, scale)
    quotient = x * reciprocal
    excess = tl.fma(quotient, tl.broadcast_to(scale, x.shape), x * -1.0)
    return tl.fma(excess, tl.broadcast_to(reciprocal * -1.0, x.shape), quotient)


@triton.jit(do_not_specialize=["rows", "cols", "scale_ld", "floor"])
def quantize_kernel(
    x_ptr, data_ptr, scale_ptr, rows, cols, x_ld, scale_ld, floor, POW2: tl.constexpr, R: tl.constexpr, G: tl.constexpr
):
    """x [rows, cols] -> data [rows, cols] e4m3, scale [ceil(cols / 128), scale_ld] fp32; R x G groups a program."""
    gdc_wait()
    gdc_launch_dependents()
    r = tl.program_id(1) * R + tl.arange(0, R)
    g = tl.program_id(0) * G + tl.arange(0, G)
    col = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    row = r.to(tl.int64)[:, None, None]
    inside = (r < rows)[:, None, None] & (col < cols)[None]
    x = tl.load(x_ptr + row * x_ld + col[None], mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(x)
    finite = magnitude < float("inf")
    amax = tl.maximum(tl.max(tl.where(finite, magnitude, 0.0), axis=2), floor)
    scale = tl.div_rn(amax, 448.0)
    if POW2:
        bits = scale.to(tl.int32, bitcast=True)  # the smallest power of two that is not smaller
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    scaled = _divide(x, scale[:, :, None])
    clamped = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    code = tl.where(finite, clamped, float("nan")).to(tl.float8e4nv)
    tl.store(data_ptr + row * cols + col[None], code, mask=inside)
    # rows past the end are the layout's padding, up to scale_ld: zeros
    padded = (r < scale_ld)[:, None] & (g * 128 < cols)[None, :]
    tl.store(scale_ptr + g[None, :] * scale_ld + r[:, None], tl.where((r < rows)[:, None], scale, 0.0), mask=padded)


def launch(x: Tensor, data: Tensor, scale: Tensor, pow2: bool, floor: float) -> Launch:
    """Arguments of one launch: x [rows, cols] with dense rows, data e4m3 [rows, cols], scale fp32 [groups, ld]."""
    rows, cols = x.shape
    groups, ld = scale.shape
    per_program = (4, 1) if rows <= 16 else (8, 4)
    tile = {"POW2": pow2, "R": per_program[0], "G": per_program[1]}
    grid = (ceil_div(groups, per_program[1]), ceil_div(ld, per_program[0]))
    arguments = (x, data, scale, rows, cols, x.stride(0), ld, floor)
    return Launch(quantize_kernel, grid, arguments, tile, {"num_warps": 4, "launch_pdl": True})


def quantize(x: Tensor, fmt: Format, floor: float) -> BlockScaled:
    """`x: [rows, cols]` as fp8 with groups of 128 in layout "tma"; power-of-two scales where `fmt` asks for them."""
    rows, cols = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    data = torch.empty(rows, cols, device=x.device, dtype=torch.float8_e4m3fn)
    scale = torch.empty(ceil_div(cols, 128), ceil_div(rows, 4) * 4, device=x.device, dtype=torch.float32)
    launch(x, data, scale, fmt.scale_rounding == "pow2_ceil", floor).run()
    return BlockScaled(data, scale, get_format("fp8_1x128"), "tma", (rows, cols))
