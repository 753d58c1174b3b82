"""How data and scales sit in memory: named pack/unpack pairs over the layout "row".

Every layout is a *physical* description: the tensors of a packed `BlockScaled` are contiguous, so a copy, a move
to another device or a save cannot change their meaning. `scale_view` gives the strided view that kernels want.

| name       | data               | scale                                                               |
|------------|--------------------|---------------------------------------------------------------------|
| row        | [rows, cols]       | [gr, gc]                                                            |
| kn         | [cols, rows]       | [gc, gr] (oneDNN's B operand)                                       |
| col_scales | [rows, cols]       | [gc, gr]: column-major scales                                       |
| tma        | [rows, cols]       | fp32 [gc, round_up(gr, 4)]: column-major, 16-byte aligned columns   |
| ue8m0x4    | [rows, cols]       | int32 [ceil(gc / 4), round_up(gr, 4)]: four E8M0 bytes, low first   |
| fnuz       | E4M3FN -> E4M3FNUZ | fp32 [gr, gc], doubled. Lossy: -0 and the sign of NaN are gone      |

gr, gc: rows and columns of the scale grid; leading dimensions stay in front. Source of "tma" and "ue8m0x4": the
operand contracts in DeepGEMM's README.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import DtypeError, ScaleError, UnknownNameError
from .tensor import BlockScaled


@dataclass(frozen=True)
class Layout:
    """pack: "row" -> this layout; unpack: back. lossless: unpack(pack(t)) has the same bytes, always."""

    name: str
    pack: Callable[[BlockScaled], BlockScaled]
    unpack: Callable[[BlockScaled], BlockScaled]
    lossless: bool = True


def decode_scale(scale: Tensor) -> Tensor:
    """Scales of any storage dtype as fp32, exactly: the one place where E8M0 bytes become numbers.

    E8M0 byte b is 2^(b - 127): 0x00 is 2^-127 (an fp32 subnormal), 0xFF is NaN (OCP MX 1.0, section 5.4.1).
    """
    if scale.dtype != torch.float8_e8m0fnu:
        return scale.float()
    byte = scale.view(torch.uint8).int()
    bits = byte << 23
    bits = torch.where(byte == 0, 0x00400000, bits)  # 2^-127 has no normal exponent field
    bits = torch.where(byte == 255, 0x7FC00000, bits)
    return bits.view(torch.float32)


def encode_e8m0(scale: Tensor) -> Tensor:
    """fp32 powers of two (or NaN) as E8M0, exactly.

    Raises ScaleError when a value is not 2^-127 … 2^127 or NaN: rounding scales would change the numerics.
    """
    mantissa, exponent = torch.frexp(scale.float())  # value = mantissa * 2^exponent with mantissa in [0.5, 1)
    byte = (exponent + 126).int()
    nan = scale.isnan()
    bad = ~nan & ((mantissa != 0.5) | (byte < 0) | (byte > 254))
    if bad.any():
        raise ScaleError(
            f"E8M0 needs powers of two in 2^-127 … 2^127, got {scale[bad].flatten()[0].item():g} "
            f"({int(bad.sum())} of {scale.numel()} scales)"
        )
    return torch.where(nan, 255, byte).to(torch.uint8).view(torch.float8_e8m0fnu)


def get_layout(name: str) -> Layout:
    """The layout of that name. Raises UnknownNameError with the nearest names."""
    if name not in LAYOUTS:
        raise UnknownNameError("layout", name, LAYOUTS)
    return LAYOUTS[name]


def convert(t: BlockScaled, layout: str) -> BlockScaled:
    """The same tensor in another layout (`LAYOUTS`, docs/formats.md); itself where it has that already.

    Raises UnknownNameError, and DtypeError for a format or scales that the layout cannot hold.
    """
    if t.layout == layout:
        return t
    return get_layout(layout).pack(get_layout(t.layout).unpack(t))


def scale_view(t: BlockScaled) -> Tensor:
    """Scales as a logical `[..., gr, gc]` view, whatever the layout; column-major ones come with strides (1, ld).

    Raises DtypeError for "ue8m0x4", whose packed words have no such view.
    """
    if t.layout == "ue8m0x4":
        raise DtypeError("ue8m0x4: packed scale words have no elementwise view; unpack to 'row' first")
    if t.layout in ("kn", "col_scales", "tma"):
        gr, _ = t.format.scale_shape(*t.shape[-2:])
        return t.scale.mT[..., :gr, :]
    return t.scale


def _swap(t: Tensor) -> Tensor:
    return _dense(_bytes(t).mT).view(t.dtype)


def _dense(t: Tensor) -> Tensor:
    """A copy with textbook strides: `contiguous` keeps odd strides on dimensions of size 1, which `view` rejects."""
    return t.clone(memory_format=torch.contiguous_format)


def _bytes(t: Tensor) -> Tensor:
    """8-bit floats as uint8, since torch implements few operations on them."""
    return t.view(torch.uint8) if t.element_size() == 1 else t


def _scales_swapped(t: BlockScaled, layout: str) -> BlockScaled:
    return replace(t, scale=_swap(t.scale), layout=layout)


def _kn(t: BlockScaled, layout: str) -> BlockScaled:
    return replace(t, data=_swap(t.data), scale=_swap(t.scale), layout=layout)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _pad_rows(t: Tensor) -> Tensor:
    """[..., gr, gc] -> contiguous [..., gc, round_up(gr, 4)], zero-padded."""
    rows = t.shape[-2]
    return _dense(F.pad(t.mT, (0, _round_up(rows, 4) - rows)))


def _tma_pack(t: BlockScaled) -> BlockScaled:
    if t.scale.dtype != torch.float32:
        raise DtypeError(f"tma: needs float32 scales, got {t.scale.dtype}")
    return replace(t, scale=_pad_rows(t.scale), layout="tma")


def _tma_unpack(t: BlockScaled) -> BlockScaled:
    return replace(t, scale=_dense(scale_view(t)), layout="row")


def _ue8m0x4_pack(t: BlockScaled) -> BlockScaled:
    if t.scale.dtype != torch.float8_e8m0fnu:
        raise DtypeError(f"ue8m0x4: needs float8_e8m0fnu scales, got {t.scale.dtype}")
    scale = t.scale.view(torch.uint8)
    scale = F.pad(scale, (0, -scale.shape[-1] % 4)).contiguous()
    return replace(t, scale=_pad_rows(scale.view(torch.int32)), layout="ue8m0x4")


def _ue8m0x4_unpack(t: BlockScaled) -> BlockScaled:
    gr, gc = t.format.scale_shape(*t.shape[-2:])
    words = _dense(t.scale.mT[..., :gr, :])
    scale = words.view(torch.uint8)[..., :gc].contiguous().view(torch.float8_e8m0fnu)
    return replace(t, scale=scale, layout="row")


def _fnuz_pack(t: BlockScaled) -> BlockScaled:
    if t.format.element.name != "fp8":
        raise DtypeError(f"fnuz: re-encodes fp8 (E4M3FN) data, got {t.format}")
    byte = t.data.view(torch.uint8)
    byte = torch.where(byte == 0x80, 0, byte)  # fnuz has one zero; its 0x80 is NaN
    byte = torch.where((t.data.view(torch.uint8) & 0x7F) == 0x7F, 0x80, byte)
    data = byte.to(torch.uint8).view(torch.float8_e4m3fnuz)
    return replace(t, data=data, scale=decode_scale(t.scale) * 2, layout="fnuz")


def _fnuz_unpack(t: BlockScaled) -> BlockScaled:
    byte = t.data.view(torch.uint8)
    data = torch.where(byte == 0x80, 0x7F, byte).to(torch.uint8).view(torch.float8_e4m3fn)
    return replace(t, data=data, scale=t.scale / 2, layout="row")


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("row", lambda t: t, lambda t: t),
        Layout("kn", lambda t: _kn(t, "kn"), lambda t: _kn(t, "row")),
        Layout("col_scales", lambda t: _scales_swapped(t, "col_scales"), lambda t: _scales_swapped(t, "row")),
        Layout("tma", _tma_pack, _tma_unpack),
        Layout("ue8m0x4", _ue8m0x4_pack, _ue8m0x4_unpack),
        Layout("fnuz", _fnuz_pack, _fnuz_unpack, lossless=False),
    )
}
