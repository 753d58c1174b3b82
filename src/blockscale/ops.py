"""The operations, as public functions: they check their input, take the container apart and call `library`."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from . import checks, gradients, library, reference, shortcut
from .errors import BlockscaleError, DtypeError, ScaleError, ShapeError, UnknownNameError
from .formats import Format, ScaleRounding, get_format
from .numerics import DEFAULT_FLOOR, Numerics, get_numerics
from .registry import Problem
from .tensor import BlockScaled

_ROUNDINGS = get_args(ScaleRounding)
_SORTED = "grouped_linear over sorted rows"


def quantize(
    x: Tensor,
    format: str | Format,
    *,
    scale: Tensor | None = None,
    scale_rounding: ScaleRounding | None = None,
    floor: float | None = None,
    layout: str = "row",
    kernel: str | None = None,
) -> BlockScaled:
    """Quantize `x: [..., rows, cols]` (fp32, bf16, fp16) to a format, with the bytes that `reference` defines.

    format: a name such as "fp8_128x128". scale: given scales `[..., grid rows, grid cols]` make it static.
    scale_rounding: "none", "pow2_ceil" or "pow2_floor" instead of the format's rule. floor: lower bound of a block's
    amax, in units of x (default 1e-10); NVFP4 has neither. layout: how the result is laid out. kernel: the kernel or
    family that must do it. NaN and infinities become the element's NaN; in FP4 the block's scale becomes NaN. Bytes
    have no gradient: a parameter is quantized as it stands, and the result does not require one.

    Raises ShapeError, DtypeError, ScaleError, UnknownNameError or NoKernelError.
    """
    fmt, x = get_format(format), _constant(x)
    reference.check_input(x, fmt)
    if scale is not None:
        reference.check_scale(scale, x, fmt)
    parts = library.OPS.quantize(x, scale, fmt.name, layout, *_rule(fmt, scale_rounding, floor), kernel or "")
    return _quantized(parts, fmt, layout, tuple(x.shape))


def swiglu_quantize(
    gate_up: Tensor,
    format: str | Format,
    *,
    limit: float | None = None,
    routing_weight: Tensor | None = None,
    scale_rounding: ScaleRounding | None = None,
    floor: float | None = None,
    layout: str = "row",
    kernel: str | None = None,
) -> BlockScaled:
    """`quantize(silu(gate) * up)` in one pass for `gate_up: [T, 2 I]`, gate first -> `[T, I]`.

    limit: gate <= limit and |up| <= limit first (DeepSeek-V4's clamped SwiGLU). routing_weight: `[T]`, multiplies
    before the quantization. The product is rounded to gate_up's dtype before it is quantized, as unfused code does.
    The other arguments are `quantize`'s; like there, the result has no gradient.

    Raises ShapeError, DtypeError, UnknownNameError or NoKernelError.
    """
    fmt, gate_up = get_format(format), _constant(gate_up)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ShapeError(f"swiglu_quantize: needs gate_up [T, 2 I], got {list(gate_up.shape)}")
    if routing_weight is not None and tuple(routing_weight.shape) != (len(gate_up),):
        raise ShapeError(
            f"swiglu_quantize: gate_up {list(gate_up.shape)} needs routing_weight [{len(gate_up)}], "
            f"got {list(routing_weight.shape)}"
        )
    weight = None if routing_weight is None else _constant(routing_weight)
    parts = library.OPS.swiglu_quantize(
        gate_up, limit, weight, fmt.name, layout, *_rule(fmt, scale_rounding, floor), kernel or ""
    )
    return _quantized(parts, fmt, layout, (gate_up.shape[0], gate_up.shape[1] // 2))


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    format: str | Format,
    *,
    scale_rounding: ScaleRounding | None = None,
    floor: float | None = None,
    layout: str = "row",
    kernel: str | None = None,
) -> BlockScaled:
    """`quantize(rmsnorm(x) * weight)` in one pass for `x: [T, K]`, `weight: [K]`.

    eps: added to the mean square of a row. The normalised row is rounded to x's dtype before it is quantized, as
    unfused code does. The other arguments are `quantize`'s; like there, the result has no gradient.

    Raises ShapeError, DtypeError, UnknownNameError or NoKernelError.
    """
    fmt, x = get_format(format), _constant(x)
    if x.dim() != 2 or tuple(weight.shape) != tuple(x.shape[1:]):
        raise ShapeError(f"rmsnorm_quantize: needs x [T, K] and weight [K], got {list(x.shape)}, {list(weight.shape)}")
    parts = library.OPS.rmsnorm_quantize(
        x, _constant(weight), eps, fmt.name, layout, *_rule(fmt, scale_rounding, floor), kernel or ""
    )
    return _quantized(parts, fmt, layout, tuple(x.shape))


def dequantize(q: BlockScaled, dtype: torch.dtype = torch.float32) -> Tensor:
    """`data * scale` in fp32, rounded once to `dtype`: `[..., rows, cols]`. Explicit, never done behind your back.

    Raises DtypeError for a dtype that is no float of 16 bits or more.
    """
    checks.stored("dequantize", "q", q)
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise DtypeError(f"dequantize: needs float32, bfloat16, float16 or float64, got {dtype}")
    return reference.dequantize(q, dtype)


def matmul(
    x: BlockScaled, w: BlockScaled, out_dtype: torch.dtype = torch.bfloat16, *, kernel: str | None = None
) -> Tensor:
    """`x: [M, K]` times `w: [N, K]` transposed, both quantized -> `[M, N]`, accumulated in fp32.

    Raises ShapeError when K differs or one is a stack, NoKernelError with every kernel's reasons.
    """
    checks.matrix("matmul", x, "x [M, K]")
    checks.matrix("matmul", w)
    checks.same_k(x.shape, w)
    y: Tensor = library.OPS.matmul(
        x.data, x.scale, x.global_scale, w.data, w.scale, w.global_scale, x.format.name, x.layout,
        w.shape[-2], w.shape[-1], w.format.name, w.layout, out_dtype, kernel or "",
    )  # fmt: skip
    return y


def linear(
    x: Tensor,
    w: BlockScaled,
    bias: Tensor | None = None,
    *,
    numerics: str | Numerics = "checkpoint",
    kernel: str | None = None,
) -> Tensor:
    """`x: [..., K]` times `w: [N, K]` transposed, plus bias `[N]` -> `[..., N]` in x's dtype.

    numerics: "checkpoint" quantizes x as the weight's format asks, "weight_only" leaves it as it is; see `Numerics`.
    kernel: the kernel or family that must do it; obeyed, or NoKernelError says why not.

    Raises ShapeError, DtypeError, UnknownNameError or NoKernelError.
    """
    try:
        data, scale, level, static = w.data, w.scale, w.global_scale, w.input_scale
    except AttributeError:
        checks.stored("linear", "w", w)
        raise
    y = shortcut.again(w.bound, x, data, scale, level, static, bias, numerics, kernel)
    if y is not None:
        return y
    checks.matrix("linear", w)
    checks.same_k(x.shape, w)
    checks.operands("linear", x, data, w.shape, bias)
    if shortcut.plain(x, data, bias):
        object.__setattr__(w, "bound", shortcut.Bound(x, w, numerics, kernel))  # a memo: what is frozen stays so
        y = shortcut.again(w.bound, x, data, scale, level, static, bias, numerics, kernel)
        if y is not None:
            return y
    return gradients.linear(x, data, scale, level, static, bias, *_how(w, numerics, kernel))


def grouped_linear(
    x: Tensor,
    w: BlockScaled,
    offsets: Tensor,
    *,
    numerics: str | Numerics = "checkpoint",
    kernel: str | None = None,
) -> Tensor:
    """Experts: rows of `x: [T, K]` sorted by expert times `w: [E, N, K]` -> `[T, N]` in x's dtype.

    offsets: int32 `[E]`, rising, the end row of each expert's slice; rows past the last come out as zero. numerics,
    kernel: as in `linear`.

    Raises ShapeError, DtypeError, UnknownNameError or NoKernelError.
    """
    checks.stored("grouped_linear", "w", w)
    checks.grouped(x.shape, w.shape, offsets)
    checks.operands("grouped_linear", x, w.data, w.shape)
    checks.where("grouped_linear", x, offsets)
    parts = (w.data, w.scale, w.global_scale, w.input_scale)
    return gradients.grouped_linear(x, *parts, offsets, *_how(w, numerics, kernel))


def masked_linear(
    x: Tensor, w: BlockScaled, counts: Tensor, *, numerics: str | Numerics = "checkpoint", kernel: str | None = None
) -> Tensor:
    """Experts with buffers of a fixed size: `x: [E, C, K]` times `w: [E, N, K]` -> `[E, C, N]` in x's dtype.

    counts: int32 `[E]`, how many of an expert's C rows hold tokens; the others are not read and come out as zero.
    Raises ShapeError, DtypeError or NoKernelError; BlockscaleError where a gradient is asked for.
    """
    checks.stored("masked_linear", "w", w)
    checks.masked(x.shape, w.shape, counts)
    checks.operands("masked_linear", x, w.data, w.shape)
    checks.where("masked_linear", x, counts)
    gradients.refuse("masked_linear", x, instead=_SORTED)
    parts = (w.data, w.scale, w.global_scale, w.input_scale)
    return shortcut.experts("masked_linear", x, *parts, counts, *_how(w, numerics, kernel))


def gathered_linear(
    x: Tensor, w: BlockScaled, ids: Tensor, *, numerics: str | Numerics = "checkpoint", kernel: str | None = None
) -> Tensor:
    """Experts, for few rows: each of `x: [T, K]` times each of its experts in `w: [E, N, K]` -> `[T, k, N]`.

    ids: int32 `[T, k]`; an id outside 0 … E - 1 stands for no expert and gives a row of zeros. Saves the sorting that
    `grouped_linear` needs, and reads an expert as often as it is named.
    Raises ShapeError, DtypeError or NoKernelError; BlockscaleError where a gradient is asked for.
    """
    checks.stored("gathered_linear", "w", w)
    checks.gathered(x.shape, w.shape, ids)
    checks.operands("gathered_linear", x, w.data, w.shape)
    checks.where("gathered_linear", x, ids)
    gradients.refuse("gathered_linear", x, instead=_SORTED)
    parts = (w.data, w.scale, w.global_scale, w.input_scale)
    return shortcut.experts("gathered_linear", x, *parts, ids, *_how(w, numerics, kernel))


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kernel: str | None = None) -> Tensor:
    """`x: [..., K]` times an unquantized `weight: [N, K]` transposed -> `[..., N]`; for lm_head and routers.

    Raises ShapeError, DtypeError or NoKernelError; BlockscaleError where a gradient is asked for (`nn.DenseLinear` has
    one).
    """
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[-1]:
        raise ShapeError(
            f"dense_linear: needs x [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}"
        )
    checks.fits("dense_linear", bias, weight.shape)
    gradients.refuse("dense_linear", x, weight, bias, instead="torch.nn.functional.linear")
    return shortcut.dense_linear(x, weight, bias, kernel or "")


def linear_problem(
    w: BlockScaled, x_dtype: torch.dtype, numerics: str | Numerics = "checkpoint", op: str = "linear"
) -> Problem:
    """The problem that `linear` poses with this weight: what `explain` and `select` take.

    x_dtype: of x and of the result. numerics: as in `linear`. op: or that of another op, such as "grouped_linear" for
    a stack `[E, N, K]`. Raises UnknownNameError.
    """
    *lead, n, k = w.shape
    policy, static = get_numerics(numerics), w.input_scale is not None
    return Problem(op, n, k, x_dtype, w.format, w.layout, x_dtype, policy, lead[0] if lead else 0, static)


def _constant(t: Tensor) -> Tensor:
    """Without its history: torch would mark all results of an op as requiring a gradient that the op does not have."""
    return t.detach() if t.requires_grad or gradients.has_tangent(t) else t


def _how(w: BlockScaled, numerics: str | Numerics, kernel: str | None) -> tuple[int, int, str, str, str, str]:
    return w.shape[-2], w.shape[-1], w.format.name, w.layout, str(numerics), kernel or ""


def _quantized(parts: tuple[Tensor, ...], fmt: Format, layout: str, shape: tuple[int, ...]) -> BlockScaled:
    data, scale, level = parts
    return BlockScaled(data, scale, fmt, layout, shape, global_scale=level if fmt.two_level else None)


def _rule(fmt: Format, rounding: str | None, floor: float | None) -> tuple[str, float]:
    """How dynamic scales are made: what was asked for, or the format's own. What cannot be obeyed raises.

    A floor of 0 would divide by it, a negative one would be no floor.
    """
    if rounding is not None and rounding not in _ROUNDINGS:
        raise UnknownNameError("scale rounding", rounding, _ROUNDINGS)
    if floor is not None and not 0 < floor < float("inf"):
        raise BlockscaleError(f"floor: needs a positive finite number, got {floor}")
    if fmt.two_level and (floor is not None or rounding not in (None, fmt.scale_rounding)):
        got = f"floor={floor}" if floor is not None else f"scale_rounding={rounding!r}"
        raise BlockscaleError(f"{fmt}: its two levels of scales know neither a floor nor a rounding rule, got {got}")
    if rounding == "none" and fmt.scale_dtype == torch.float8_e8m0fnu:
        raise ScaleError(f"{fmt}: its scales are powers of two, need 'pow2_ceil' or 'pow2_floor', got {rounding!r}")
    return rounding or "", DEFAULT_FLOOR if floor is None else floor
