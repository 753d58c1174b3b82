"""Results against the definition: the bounds, where they come from, and the first element beyond them.

Multiplications are held to this, element by element (docs/conformance.md derives it):

    |got - want| <= u_out |want| + (gamma(K + c) + accumulation_error) Σ |x| |w| + tiny,   gamma(n) = n u / (1 - n u)

u_out: unit roundoff of the result's dtype; u = 2^-24, fp32's. K products summed in fp32 in any order cost gamma(K)
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1 and 4.2), the roundings that a term goes
through outside of the sum are counted by `roundings` from the formats. `accumulation_error`: 0 unless the kernel
declares one, as tensor cores that accumulate in fewer bits must. Quantize ops are held to the bytes of the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layouts, reference
from ..formats import Format
from ..tensor import BlockScaled
from .cases import Case
from .memory import raw
from .operands import RMS_EPS, SWIGLU_LIMIT, Expected, Operands
from .tolerance import Found, product_bound


def roundings(case: Case) -> int:
    """c: fp32 roundings of one term outside of the sum. One for the product, one for the bias, and for each operand
    those of `data * scale`; or, where scales are applied to sums, as many for the sums."""
    x = case.policy.activation_format(case.fmt) if case.fmt else None
    return 2 + sum(2 if f.two_level else 1 if f.scale_rounding == "none" else 0 for f in (x, case.fmt) if f)


def bound(case: Case, want: Expected, dtype: torch.dtype, accumulation_error: float) -> Tensor:
    """The bound above for every element, fp64 `[M, N]`."""
    return product_bound(want.value, want.magnitude, case.k + roundings(case), dtype, accumulation_error)


def product(got: Tensor, case: Case, want: Expected, accumulation_error: float) -> Found:
    """A multiplication's first element beyond its bound, and the worst error over its bound. got: on the CPU."""
    if tuple(got.shape) != tuple(want.value.shape) or got.dtype != case.x_dtype:
        return [], _kind(got), f"{case.x_dtype} {list(want.value.shape)}", float("inf")
    value = got.double()
    error = (value - want.value).abs() / bound(case, want, got.dtype, accumulation_error)
    same = (value == want.value) | (value.isnan() & want.value.isnan())  # infinities: their difference is NaN
    error = torch.where(same, 0.0, error).nan_to_num(torch.inf)
    top = float(error.max())
    if top <= 1:
        return None, "", "", top
    wrong = (error > 1).nonzero()
    at, worst = wrong[0].tolist(), divmod(int(error.argmax()), got.shape[1])
    exact = want.value[at[0], at[1]]
    rounded = exact.to(got.dtype).reshape(1)
    need = f"{exact.item():.9g} (bytes {_hex(raw(rounded)[0])})"
    need += f"; {len(wrong)} of {error.numel()} beyond the bound, {top:.3g} of it at {list(worst)}"
    return at, f"{got[at[0], at[1]].item():.9g} (bytes {_hex(raw(got)[at[0], at[1]])})", need, top


def row_error(got: Tensor, want: Expected) -> float:
    """The worst row's |got - want| / |want| (2-norms): a global norm would pass with whole rows zeroed. Rows that hold
    NaN or infinities, or are zero, are left out."""
    if tuple(got.shape) != tuple(want.value.shape):
        return float("inf")
    norm = want.value.norm(dim=1)
    rows = ((got.double() - want.value).norm(dim=1) / norm)[norm.isfinite() & (norm > 0)]
    return float(rows.max()) if len(rows) else 0.0


def quantized_bytes(got: BlockScaled, case: Case, o: Operands) -> Found:
    """The first byte of a quantize op's result that the definition does not have there."""
    assert case.fmt is not None
    want = layouts.convert(reference.quantize(o.x, case.fmt, scale=o.scale, floor=o.floor), case.layout)
    for part in ("data", "scale", "global_scale"):
        a, b = getattr(got, part), getattr(want, part)
        if a is None and b is None:
            continue
        if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
            return [], f"{part} {_kind(a)}", f"{part} {_kind(b)}", float("inf")
        raw_a, raw_b = raw(a), raw(b)
        differs = (raw_a != raw_b).any(-1)
        if differs.any():
            at = differs.nonzero()[0].tolist()
            have, need = (_hex(r[tuple(at)]) for r in (raw_a, raw_b))
            count = f"{int(differs.sum())} of {differs.numel()} differ"
            return at, f"{part} bytes {have}", f"{part} bytes {need} ({count})", float("inf")
    return None, "", "", 0.0


def fused(got: BlockScaled, case: Case, o: Operands) -> Found:
    """swiglu_quantize and rmsnorm_quantize, whose exp and mean no two libraries round alike.

    The value h before the quantization may be one unit of x's dtype off (its last rounding) and 2^-20 before that, so
    what is read back is within `|h| (u_e (1 + d) + d) + scale * half a step`: u_e the element's unit roundoff, d the
    relative error of h, and scale the definition's, doubled where a power of two may fall on the other side.
    """
    fmt, assumed = case.fmt, o.dense
    assert fmt is not None
    if case.op == "swiglu_quantize":
        h = reference.swiglu(o.x, None if assumed is None else SWIGLU_LIMIT, assumed).float()
    else:
        assert assumed is not None
        h = reference.rmsnorm(o.x, assumed, RMS_EPS).float()
    want = reference.quantize(h, fmt, floor=o.floor)
    got = layouts.convert(got, "row")
    if got.data.shape != want.data.shape or got.scale.shape != want.scale.shape:
        return [], _kind(got.data), _kind(want.data), float("inf")
    off = torch.finfo(case.x_dtype).eps + 2.0**-20
    element = torch.finfo(fmt.element.dtype)
    scale = _per_element(want, fmt)
    step = scale * element.tiny * element.eps / 2 * (2 if fmt.scale_rounding != "none" else 1)
    if fmt.scale_rounding == "pow2_floor":
        h = torch.where(h.isfinite(), h.clamp(-fmt.max * scale, fmt.max * scale), h)  # the top of a block saturates
    limit = h.abs() * (element.eps / 2 * (1 + off) + off) + step * (1 + off) + torch.finfo(torch.float32).tiny
    value = reference.dequantize(got)
    error = ((value - h).abs() / limit).nan_to_num(torch.inf)
    error = torch.where(h.isfinite(), error, torch.where(value.isnan(), 0.0, torch.inf))
    top = float(error.max())
    if top <= 1:
        return None, "", "", top
    at = (error > 1).nonzero()[0].tolist()
    return at, f"{value[at[0], at[1]].item():.9g}", f"{h[at[0], at[1]].item():.9g}", top


def _per_element(q: BlockScaled, fmt: Format) -> Tensor:
    rows, cols = q.shape
    br, bc = fmt.block_shape(rows, cols)
    return layouts.decode_scale(q.scale).repeat_interleave(br, 0)[:rows].repeat_interleave(bc, 1)[:, :cols]


def _kind(t: Tensor | None) -> str:
    return "none" if t is None else f"{t.dtype} {list(t.shape)}"


def _hex(element: Tensor) -> str:
    return bytes(element.tolist()).hex()
