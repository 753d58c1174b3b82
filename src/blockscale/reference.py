"""Every operation in plain torch: the definition that all kernels are held to. Clarity beats speed.

Quantization is a definition down to the byte:

1. x is taken to fp32. Each block's `amax` is the largest finite |x|, at least `floor`.
2. scale = amax / max in IEEE fp32, then rounded as the format says ("none", "pow2_ceil", "pow2_floor").
3. data = round-to-nearest-even(clamp(x / scale, -max, max)), an IEEE fp32 division, the sign of zero kept.
4. A NaN or an infinity becomes the element's NaN, so an overflow upstream stays visible and cannot move the
   scale of its neighbours. FP4 has no NaN: there the whole block's scale becomes NaN.
5. Ragged edges: as if padded with zeros, quantized and cropped.

Multiplication is defined over the dequantized values; kernels differ from it by rounding only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .errors import DtypeError, ScaleError, ShapeError
from .formats import Format, ScaleRounding
from .layouts import convert, decode_scale, encode_e8m0
from .numerics import DEFAULT_FLOOR, Numerics
from .tensor import BlockScaled

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP MX 1.0, table 5
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantize(
    x: Tensor,
    fmt: Format,
    *,
    scale: Tensor | None = None,
    scale_rounding: ScaleRounding | None = None,
    floor: float | None = None,
    global_scale: Tensor | None = None,
) -> BlockScaled:
    """Quantize `x: [..., rows, cols]` to `fmt`.

    scale: given scales `[..., grid rows, grid cols]` make it static; None computes them from x.
    scale_rounding: overrides the format's rule for dynamic scales.
    floor: lower bound of a block's amax, in units of x; default 1e-10 (for NVFP4: none, see below).
    global_scale: NVFP4's second level; None takes amax(x) / (448 * 6) of each matrix.

    Raises ShapeError, DtypeError or ScaleError.
    """
    check_input(x, fmt)
    x = x.float()
    if fmt.two_level:
        return _quantize_nvfp4(x, fmt, scale, global_scale)
    blocks = to_blocks(x, fmt)
    if scale is None:
        amax = block_amax(blocks).clamp(min=DEFAULT_FLOOR if floor is None else floor)
        scale = store_scale(round_scale(amax, fmt, scale_rounding or fmt.scale_rounding), fmt)
    else:
        scale = check_scale(scale, x, fmt)
    if fmt.packed:
        holds_nan = ~blocks.isfinite().all(-1).all(-2)
        scale = encode_e8m0(torch.where(holds_nan, torch.nan, decode_scale(scale)))
    data = encode(blocks / decode_scale(scale)[..., None, :, None], fmt)
    return BlockScaled(from_blocks(data, x.shape, fmt), scale, fmt, shape=tuple(x.shape))


def dequantize(q: BlockScaled, dtype: torch.dtype = torch.float32) -> Tensor:
    """`data * scale` in fp32, rounded once to `dtype`: `[..., rows, cols]`."""
    q = convert(q, "row")
    rows, cols = q.shape[-2:]
    br, bc = q.format.block_shape(rows, cols)
    scale = decode_scale(q.scale)
    if q.global_scale is not None:
        scale = scale * q.global_scale.float().reshape(*q.global_scale.shape, 1, 1)
    scale = scale.repeat_interleave(br, -2)[..., :rows, :].repeat_interleave(bc, -1)[..., :cols]
    return (decode(q.data, q.format)[..., :cols] * scale).to(dtype)


def matmul(
    x: BlockScaled, w: BlockScaled, out_dtype: torch.dtype = torch.float32, *, compute: torch.dtype = torch.float64
) -> Tensor:
    """`x: [M, K]`, `w: [N, K]` -> `x @ w.T: [M, N]`, summed in `compute` and rounded once to `out_dtype`."""
    checks.same_k(x.shape, w)
    return (dequantize(x).to(compute) @ dequantize(w).to(compute).mT).to(out_dtype)


def linear(
    x: Tensor,
    w: BlockScaled,
    bias: Tensor | None = None,
    *,
    numerics: Numerics,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """`x: [..., K]`, `w: [N, K]` -> `[..., N]` in x's dtype, activations treated as `numerics` says."""
    checks.same_k(x.shape, w)
    flat = x.reshape(-1, x.shape[-1])
    y = activations(flat, w, numerics).to(compute) @ dequantize(w).to(compute).mT
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype).reshape(*x.shape[:-1], w.shape[-2])


def grouped_linear(
    x: Tensor,
    w: BlockScaled,
    offsets: Tensor,
    *,
    numerics: Numerics,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """Rows sorted by expert: `x: [T, K]`, `w: [E, N, K]` -> `[T, N]`.

    offsets: int `[E]`, the end row of each expert's slice (`cumsum` of the counts). Rows past the last are zero.
    """
    checks.grouped(x.shape, w.shape, offsets)
    y = x.new_zeros(x.shape[0], w.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            y[start:end] = linear(x[start:end], w[expert], numerics=numerics, compute=compute)
        start = max(start, end)
    return y


def activations(x: Tensor, w: BlockScaled, numerics: Numerics) -> Tensor:
    """What multiplies the weights, in fp32: x itself, or x quantized and read back. `x: [M, K]`."""
    fmt = numerics.activation_format(w.format)
    if fmt is None:
        return x.float()
    return dequantize(quantize_activations(x, fmt, w, numerics))


def quantize_activations(x: Tensor, fmt: Format, w: BlockScaled, numerics: Numerics) -> BlockScaled:
    """`x: [M, K]` in the activation format, with the static scale stored beside `w` where there is one."""
    if fmt.two_level:
        return quantize(x, fmt, global_scale=None if w.input_scale is None else w.input_scale.reshape(()))
    if w.input_scale is not None and fmt.block == (None, None):
        return quantize(x, fmt, scale=w.input_scale.reshape(1, 1))
    return quantize(x, fmt, floor=numerics.act_floor)


def swiglu(gate_up: Tensor, limit: float | None = None, routing_weight: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` in fp32 for `gate_up: [T, 2 I]` (gate first) -> `[T, I]` in its dtype.

    limit: clamps gate <= limit and |up| <= limit first (DeepSeek-V4). routing_weight: `[T]`, multiplies the result.
    """
    gate, up = gate_up.float().chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = F.silu(gate) * up
    if routing_weight is not None:
        y = y * routing_weight.float()[:, None]
    return y.to(gate_up.dtype)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` in fp32 for `x: [T, K]`, `weight: [K]`, in x's dtype."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


# -- parts of the definition, shared with kernels and tests ------------------------------------------------------


def to_blocks(x: Tensor, fmt: Format) -> Tensor:
    """`[..., rows, cols]` -> zero-padded `[..., grid rows, block rows, grid cols, block cols]`."""
    rows, cols = x.shape[-2:]
    br, bc = fmt.block_shape(rows, cols)
    padded = F.pad(x, (0, -cols % bc, 0, -rows % br))
    return padded.reshape(*x.shape[:-2], -(-rows // br), br, -(-cols // bc), bc)


def from_blocks(blocks: Tensor, shape: torch.Size | tuple[int, ...], fmt: Format) -> Tensor:
    """Undo `to_blocks` on encoded data: crop the padding and pack FP4."""
    rows, cols = shape[-2:]
    byte = blocks.view(torch.uint8).flatten(-2).flatten(-3, -2)[..., :rows, :cols]
    return pack_fp4(byte) if fmt.packed else byte.contiguous().view(fmt.element.dtype)


def block_amax(blocks: Tensor) -> Tensor:
    """Largest finite magnitude of each block: `[..., grid rows, grid cols]`."""
    magnitude = blocks.abs()
    return torch.where(magnitude < torch.inf, magnitude, 0.0).amax((-3, -1))


def round_scale(amax: Tensor, fmt: Format, rounding: ScaleRounding) -> Tensor:
    """Scale of a block with this (floored) amax, fp32."""
    if rounding == "none":
        return divide(amax, fmt.max)
    if rounding == "pow2_ceil":
        mantissa, exponent = torch.frexp(divide(amax, fmt.max))
        exponent = exponent - (mantissa == 0.5).int()
    else:
        exponent = torch.frexp(amax)[1] - 1 - fmt.element.max_exponent
    return torch.ldexp(torch.ones_like(amax), exponent.clamp(-127, 127))


def divide(t: Tensor, by: float) -> Tensor:
    """`t / by`, rounded as IEEE says. CUDA's `tensor / number` multiplies by 1 / number: other bytes."""
    return t / torch.full_like(t, by)


def store_scale(scale: Tensor, fmt: Format) -> Tensor:
    """fp32 scales in the dtype that the format stores by default."""
    return encode_e8m0(scale) if fmt.scale_dtype == torch.float8_e8m0fnu else scale


def encode(scaled: Tensor, fmt: Format) -> Tensor:
    """fp32 values in units of their scale -> element codes, one byte each, same shape."""
    clamped = scaled.clamp(-fmt.max, fmt.max)
    if fmt.packed:
        return encode_fp4(clamped.nan_to_num(0.0))
    byte = clamped.to(fmt.element.dtype).view(torch.uint8)
    assert fmt.element.nan is not None, "only packed elements lack a NaN"
    return torch.where(scaled.isfinite(), byte, fmt.element.nan).to(torch.uint8)


def decode(data: Tensor, fmt: Format) -> Tensor:
    """Stored elements as fp32: `[..., cols]`."""
    if not fmt.packed:
        return data.to(torch.float32)
    byte = data.view(torch.uint8)
    code = torch.stack([byte & 15, byte >> 4], -1).flatten(-2).long()
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=data.device)
    return table[code]


def encode_fp4(x: Tensor) -> Tensor:
    """|x| <= 6 to E2M1 codes 0 … 15, ties to the even code."""
    grid = torch.tensor(_E2M1, device=x.device)
    midpoints = (grid[1:] + grid[:-1]) / 2
    magnitude = x.abs().contiguous()
    below, above = torch.bucketize(magnitude, midpoints), torch.bucketize(magnitude, midpoints, right=True)
    code = torch.where(below % 2 == 0, below, above)  # they differ at a tie, by one: take the even of the two
    return (code + 8 * torch.signbit(x)).to(torch.uint8)


def pack_fp4(codes: Tensor) -> Tensor:
    """`[..., cols]` codes -> `[..., ceil(cols / 2)]` bytes, the even column in the low nibble."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _quantize_nvfp4(x: Tensor, fmt: Format, scale: Tensor | None, global_scale: Tensor | None) -> BlockScaled:
    """Two levels: e4m3 block scales `amax16 / 6 / global`, one fp32 global scale for each matrix."""
    blocks = to_blocks(x, fmt)
    amax = block_amax(blocks)
    if global_scale is None:
        global_scale = divide(F.pad(amax, (0, 0, 0, 1)).amax((-1, -2)), 448.0 * fmt.max)  # a row of zeros: for no rows
        global_scale = torch.where(global_scale > 0, global_scale, 1.0)
    global_scale = global_scale.float()
    level = global_scale.reshape(*global_scale.shape, 1, 1)
    if scale is None:
        scale = (divide(amax, fmt.max) / level).clamp(max=448.0).to(torch.float8_e4m3fn)
    else:
        scale = check_scale(scale, x, fmt)
    holds_nan = ~blocks.isfinite().all(-1).all(-2)
    nan = torch.tensor(0x7F, dtype=torch.uint8, device=x.device)
    scale = torch.where(holds_nan, nan, scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    step = (scale.float() * level)[..., None, :, None]
    data = encode(torch.where(step > 0, blocks / step, torch.zeros_like(blocks)), fmt)
    return BlockScaled(from_blocks(data, x.shape, fmt), scale, fmt, shape=tuple(x.shape), global_scale=global_scale)


def check_input(x: Tensor, fmt: Format) -> None:
    if x.dtype not in _FLOATS:
        raise DtypeError(f"quantize to {fmt}: needs float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ShapeError(f"quantize to {fmt}: needs [..., rows, cols] with cols > 0, got {list(x.shape)}")
    if fmt.packed and x.shape[-1] % 2:
        raise ShapeError(f"quantize to {fmt}: two elements share a byte, so cols must be even, got {list(x.shape)}")


def check_scale(scale: Tensor, x: Tensor, fmt: Format) -> Tensor:
    want = (*x.shape[:-2], *fmt.scale_shape(*x.shape[-2:]))
    if tuple(scale.shape) != want:
        raise ShapeError(f"quantize to {fmt}: x {list(x.shape)} needs scale {list(want)}, got {list(scale.shape)}")
    if scale.dtype not in fmt.scale_dtypes:
        raise DtypeError(f"quantize to {fmt}: needs a scale in one of {fmt.scale_dtypes}, got {scale.dtype}")
    value = decode_scale(scale)
    bad = ~(value.isfinite() & ((value > 0) | torch.tensor(fmt.two_level)))
    if bad.any():
        raise ScaleError(
            f"quantize to {fmt}: scales must be finite and positive, got {value[bad][0].item()} "
            f"at {bad.nonzero()[0].tolist()}"
        )
    return scale
