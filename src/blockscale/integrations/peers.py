"""Functions under the names that vLLM, SGLang and DeepGEMM code already calls: change an import, keep the call.

    from blockscale.integrations.peers import per_token_group_quant_fp8, w8a8_block_fp8_matmul, fp8_gemm_nt

Signatures follow vLLM 0.33, SGLang and DeepGEMM 2.8; what is computed follows our definition (`reference`), which
differs from theirs in one place: an E8M0 byte 0x00 is 2^-127 and 0xFF is NaN. Arguments that would change numbers and
have no meaning here raise; hints that only tune the original do nothing.

All raise ShapeError or DtypeError for operands that do not fit together, NoKernelError where nothing can run them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..errors import BlockscaleError, DtypeError, ShapeError
from ..formats import ELEMENTS, Format, get_format
from ..layouts import convert, decode_scale, encode_e8m0, scale_view
from ..tensor import BlockScaled

Scaled = tuple[Tensor, Tensor]
"""(data, scale), as DeepGEMM passes operands."""

# -- vLLM and SGLang ---------------------------------------------------------------------------------------------


def per_token_group_quant_fp8(
    x: Tensor,
    group_size: int,
    eps: float = 1e-10,
    dtype: torch.dtype | None = None,
    column_major_scales: bool = False,
    tma_aligned_scales: bool = False,
    out_q: Tensor | None = None,
    use_ue8m0: bool | None = None,
) -> Scaled:
    """Quantize each `group_size` elements of a row: `x: [..., K]` -> data `[..., K]`, fp32 scale `[..., K / group]`.

    eps: lower bound of a group's amax. dtype: e4m3fn (default), e4m3fnuz or e5m2. column_major_scales: scale strides
    (1, M); with tma_aligned_scales (1, round_up(M, 4)). out_q: written in place. use_ue8m0: scales are powers of two.

    Raises ShapeError when K is not a multiple of group_size, as the originals assert.
    """
    k = x.shape[-1]
    if k % group_size:
        raise ShapeError(f"per_token_group_quant_fp8: K={k} is not a multiple of group_size={group_size}")
    flat = x.reshape(-1, k)
    fmt = get_format(f"{_element(dtype)}_1x{group_size}")
    layout = ("tma" if tma_aligned_scales else "col_scales") if column_major_scales else "row"
    q = _pow2(flat, fmt, eps, layout) if use_ue8m0 else ops.quantize(flat, fmt, floor=eps, layout=layout)
    data = q.data.view(x.shape)
    if out_q is not None:
        if out_q.shape != x.shape or out_q.dtype != data.dtype:
            raise ShapeError(f"out_q needs {data.dtype} {list(x.shape)}, got {out_q.dtype} {list(out_q.shape)}")
        out_q.copy_(data)
        data = out_q
    scale = scale_view(q)
    return data, scale if column_major_scales else scale.reshape(*x.shape[:-1], k // group_size)


def w8a8_block_fp8_matmul(
    A: Tensor,
    B: Tensor,
    As: Tensor,
    Bs: Tensor,
    block_size: list[int],
    output_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """`A: [..., K]` fp8 with `As: [..., K / bk]` times `B: [N, K]` with `Bs: [N / bn, K / bk]` -> `[..., N]`."""
    bn, bk = block_size
    k = A.shape[-1]
    x = _operand(A.reshape(-1, k), As.reshape(-1, As.shape[-1]), (1, bk))
    y = ops.matmul(x, _operand(B, Bs, (bn, bk)), output_dtype)
    return y.view(*A.shape[:-1], B.shape[0])


w8a8_triton_block_scaled_mm = w8a8_block_fp8_matmul


class QuantFP8:
    """vLLM's activation quantizer. `group_shape`: (row, col) with -1 for the whole dimension.

    Call: `x: [M, K]`, optional static `scale` -> (data, scale).
    """

    def __init__(
        self,
        static: bool,
        group_shape: tuple[int, int],
        num_token_padding: int | None = None,
        column_major_scales: bool = False,
        tma_aligned_scales: bool = False,
        use_ue8m0: bool | None = None,
    ) -> None:
        row, col = group_shape
        if (row, col) == (-1, -1):
            granularity = "tensor"
        elif (row, col) == (1, -1):
            granularity = "row"
        elif row == 1 and col > 0:
            granularity = f"1x{col}"
        else:
            raise BlockscaleError(f"QuantFP8: group_shape needs (-1, -1), (1, -1) or (1, cols), got {group_shape}")
        self.format = get_format(f"fp8_{granularity}")
        self.static, self.padding, self.pow2 = static, num_token_padding, bool(use_ue8m0)
        self.layout = ("tma" if tma_aligned_scales else "col_scales") if column_major_scales else "row"

    def __call__(self, x: Tensor, scale: Tensor | None = None, scale_ub: Tensor | None = None) -> Scaled:
        if scale_ub is not None:
            raise BlockscaleError("QuantFP8: scale_ub would change the scales that the definition gives; not supported")
        if self.static != (scale is not None):
            need = "a scale" if self.static else "no scale"
            raise BlockscaleError(f"QuantFP8(static={self.static}): needs {need}")
        rows = max(self.padding or 0, x.shape[0])
        if scale is not None:
            q = ops.quantize(x, self.format, scale=scale.float().reshape(self.format.scale_shape(*x.shape)))
        elif self.pow2:
            q = _pow2(x, self.format, 1e-10, self.layout)
        else:
            q = ops.quantize(x, self.format, layout=self.layout)
        data = q.data
        if rows > x.shape[0]:
            padded = data.new_zeros((rows, x.shape[1]), dtype=torch.uint8)
            padded[: x.shape[0]] = data.view(torch.uint8)
            data = padded.view(data.dtype)
        return data, scale_view(q)


# -- DeepGEMM ----------------------------------------------------------------------------------------------------


def per_token_cast_to_fp8(x: Tensor, use_ue8m0: bool) -> Scaled:
    """`x: [M, K]` in 1x128 groups, amax floored at 1e-4 as DeepGEMM does -> (data, fp32 scale `[M, ceil(K / 128)]`)."""
    fmt = get_format("fp8_1x128")
    q = _pow2(x, fmt, 1e-4, "row") if use_ue8m0 else ops.quantize(x, fmt, floor=1e-4)
    return q.data, q.scale


def per_block_cast_to_fp8(x: Tensor, use_ue8m0: bool) -> Scaled:
    """`x: [N, K]` in 128x128 blocks, amax floored at 1e-4 -> (data, fp32 scale)."""
    fmt = get_format("fp8_128x128")
    q = _pow2(x, fmt, 1e-4, "row") if use_ue8m0 else ops.quantize(x, fmt, floor=1e-4)
    return q.data, q.scale


def fp8_gemm_nt(a: Scaled, b: Scaled, d: Tensor, c: Tensor | None = None, disable_ue8m0_cast: bool = True) -> None:
    """`d[M, N] = a[M, K] @ b[N, K].T (+ c)`, scales 1x128 and 128x128.

    disable_ue8m0_cast=False would round fp32 scales to powers of two on the way; that changes numerics and raises.
    """
    _no_rounding(disable_ue8m0_cast, a[1], b[1])
    y = ops.matmul(_operand(*a, (1, 128)), _operand(*b, (128, 128)), d.dtype)
    d.copy_(y if c is None else y + c)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Scaled, b: Scaled, d: Tensor, m_indices: Tensor, disable_ue8m0_cast: bool = True
) -> None:
    """Rows of `a: [M, K]` belong to expert `m_indices[row]` of `b: [E, N, K]`; -1 is padding, whose rows of d stay."""
    _no_rounding(disable_ue8m0_cast, a[1], b[1])
    w = _operand(*b, (128, 128))
    for expert in range(w.shape[0]):
        rows = (m_indices == expert).nonzero()[:, 0]
        if len(rows):
            part = _operand(_rows(a[0], rows), a[1][rows], (1, 128))
            d[rows] = ops.matmul(part, w[expert], d.dtype)


def m_grouped_fp8_gemm_nt_masked(
    a: Scaled, b: Scaled, d: Tensor, masked_m: Tensor, expected_m: int, disable_ue8m0_cast: bool = True
) -> None:
    """Expert e takes the first `masked_m[e]` rows of `a: [E, M, K]`; the other rows of `d: [E, M, N]` stay.

    expected_m is a tuning hint of the original and changes nothing here.
    """
    _no_rounding(disable_ue8m0_cast, a[1], b[1])
    w = _operand(*b, (128, 128))
    for expert, count in enumerate(masked_m.tolist()):
        if count:
            part = _operand(a[0][expert, :count], a[1][expert, :count], (1, 128))
            d[expert, :count] = ops.matmul(part, w[expert], d.dtype)


def transform_sf_into_required_layout(
    sf: Tensor,
    mn: int,
    k: int,
    recipe: tuple[int, int, int],
    num_groups: int | None = None,
    is_sfa: bool = False,
    disable_ue8m0_cast: bool = True,
) -> Tensor:
    """Scales as DeepGEMM's kernels want them: TMA-aligned column-major fp32 for sm_90, `[.., mn, k / 128]` in and out.

    recipe: (1, 128, 128): (rows of A, rows of B, columns) that share a scale.
    """
    if not disable_ue8m0_cast:
        raise BlockscaleError(
            "transform_sf_into_required_layout: rounding fp32 scales to UE8M0 changes numerics; not supported"
        )
    rows = recipe[0] if is_sfa else recipe[1]
    fmt = get_format(f"fp8_{rows}x{recipe[2]}")
    lead = () if num_groups is None else (num_groups,)
    want = (*lead, *fmt.scale_shape(mn, k))
    if tuple(sf.shape) != want:
        raise ShapeError(
            f"transform_sf_into_required_layout: mn={mn}, k={k} needs scales {list(want)}, got {list(sf.shape)}"
        )
    if rows != 1:
        return sf.contiguous()
    shell = BlockScaled.trusted(sf, sf.float(), fmt, "row", (*lead, mn, k))
    return scale_view(convert(shell, "tma"))


# -- shared ------------------------------------------------------------------------------------------------------


def _element(dtype: torch.dtype | None) -> str:
    names = {e.dtype: e.name for e in ELEMENTS.values() if e.bits == 8}
    if (dtype or torch.float8_e4m3fn) not in names:
        raise DtypeError(f"needs one of {list(map(str, names))}, got {dtype}")
    return names[dtype or torch.float8_e4m3fn]


def _pow2(x: Tensor, fmt: Format, floor: float, layout: str) -> BlockScaled:
    """Powers of two kept in fp32, as these interfaces hand them out."""
    q = ops.quantize(x, get_format(f"{fmt.name}_ue8m0"), floor=floor)
    return convert(BlockScaled(q.data, decode_scale(q.scale), fmt), layout)


def _operand(data: Tensor, scale: Tensor, block: tuple[int, int]) -> BlockScaled:
    """(data, scale) of any strides as a BlockScaled; E8M0 scales, also as uint8, keep their bytes."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    ue8m0 = scale.dtype == torch.float8_e8m0fnu
    fmt = get_format(f"{_element(data.dtype)}_{block[0]}x{block[1]}{'_ue8m0' if ue8m0 else ''}")
    return BlockScaled(data.contiguous(), scale.contiguous(), fmt)


def _rows(data: Tensor, rows: Tensor) -> Tensor:
    """Rows of 8-bit floats, which torch cannot index on every device."""
    return data.view(torch.uint8)[rows].view(data.dtype)


def _no_rounding(disable_ue8m0_cast: bool, *scales: Tensor) -> None:
    """Scales that are powers of two already may be 'cast'; others would be rounded."""
    if disable_ue8m0_cast:
        return
    for scale in scales:
        encode_e8m0(decode_scale(scale))  # raises ScaleError unless that is exact
