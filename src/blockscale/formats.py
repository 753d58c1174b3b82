"""What the numbers mean: element type, block and scale rule of every format. Data, no code paths.

A format says that `x ≈ data * scale`: `data` holds 8- or 4-bit floats and one `scale` serves a block of
`(rows, cols)` elements. Names follow `<element>_<granularity>[_ue8m0]`; `mxfp8`, `mxfp4` and `nvfp4` are the
names their specifications use.

Sources: OCP OFP8 1.0 (E4M3, E5M2), OCP Microscaling (MX) 1.0 (E2M1, E8M0, 1x32 blocks), the DeepSeek-V3
technical report (1x128 activations, 128x128 weights), NVIDIA's NVFP4 note (1x16 blocks, two-level scales).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from .errors import UnknownNameError

ScaleRounding = Literal["none", "pow2_ceil", "pow2_floor"]


@dataclass(frozen=True)
class Element:
    """One element type.

    max: the largest finite magnitude. max_exponent: floor(log2(max)), `emax` in the MX specification.
    nan: the code that every NaN and infinity is stored as; None when the type has no NaN.
    bits: 4-bit elements are stored two to a byte along the columns, the even column in the low nibble.
    """

    name: str
    dtype: torch.dtype
    max: float
    max_exponent: int
    nan: int | None
    bits: int = 8


ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {
        e.name: e
        for e in (
            Element("fp8", torch.float8_e4m3fn, 448.0, 8, 0x7F),
            Element("fp8e5m2", torch.float8_e5m2, 57344.0, 15, 0x7F),
            Element("fp8fnuz", torch.float8_e4m3fnuz, 240.0, 7, 0x80),
            Element("fp4", torch.uint8, 6.0, 2, None, bits=4),
        )
    }
)


@dataclass(frozen=True)
class Format:
    """How a tensor `[..., rows, cols]` is stored.

    block: (rows, cols) of elements that share one scale; None is the whole dimension.
    scale_rounding: how a dynamic scale is made from a block's largest magnitude `amax`:
        "none"        amax / max, in fp32
        "pow2_ceil"   the smallest power of two >= amax / max (DeepSeek's ue8m0: nothing saturates)
        "pow2_floor"  2^(floor(log2(amax)) - max_exponent) (OCP MX: the top of a block may saturate)
    scale_dtype: what `quantize` stores scales in. A checkpoint may hold the same values in another dtype
        of `scale_dtypes`; read `scale.dtype`, not the name.
    two_level: block scales are themselves multiplied by one fp32 `global_scale` (NVFP4).
    """

    name: str
    element: Element
    block: tuple[int | None, int | None]
    scale_rounding: ScaleRounding = "none"
    scale_dtype: torch.dtype = torch.float32
    two_level: bool = False

    @property
    def max(self) -> float:
        return self.element.max

    @property
    def packed(self) -> bool:
        """Two elements in a byte."""
        return self.element.bits == 4

    @property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes in which scales of this format may be stored."""
        if self.two_level:
            return (torch.float8_e4m3fn,)
        if self.scale_rounding == "none":
            return (torch.float32, torch.bfloat16, torch.float16)
        return (torch.float8_e8m0fnu, torch.float32, torch.bfloat16)

    def block_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """The block in elements, whole dimensions filled in."""
        return self.block[0] or max(rows, 1), self.block[1] or max(cols, 1)

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Scales needed for `[rows, cols]` elements; ragged edges get a scale of their own."""
        br, bc = self.block_shape(rows, cols)
        return -(-rows // br), -(-cols // bc)

    def data_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Stored shape of `[rows, cols]` elements: packed FP4 halves the columns."""
        return rows, -(-cols // 2) if self.packed else cols

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)


_E8M0 = torch.float8_e8m0fnu
_NAMED = {
    "mxfp8": Format("mxfp8", ELEMENTS["fp8"], (1, 32), "pow2_floor", _E8M0),
    "mxfp4": Format("mxfp4", ELEMENTS["fp4"], (1, 32), "pow2_floor", _E8M0),
    "nvfp4": Format("nvfp4", ELEMENTS["fp4"], (1, 16), "none", torch.float8_e4m3fn, two_level=True),
}
_GRAMMAR = re.compile(r"(fp8|fp8e5m2|fp8fnuz)_(tensor|row|([1-9]\d*)x([1-9]\d*))(_ue8m0)?")


def _build(name: str) -> Format | None:
    match = _GRAMMAR.fullmatch(name)
    if not match:
        return _NAMED.get(name)
    element, granularity, rows, cols, ue8m0 = match.groups()
    block = {"tensor": (None, None), "row": (1, None)}.get(granularity) or (int(rows), int(cols))
    if ue8m0:
        return Format(name, ELEMENTS[element], block, "pow2_ceil", _E8M0)
    return Format(name, ELEMENTS[element], block)


def _catalogue() -> dict[str, Format]:
    granularities = ("tensor", "row", "1x32", "1x64", "1x128", "32x32", "128x128")
    names = [f"{e}_{g}{u}" for e in ("fp8", "fp8e5m2", "fp8fnuz") for g in granularities for u in ("", "_ue8m0")]
    return {name: fmt for name in (*names, *_NAMED) if (fmt := _build(name))}


FORMATS: Mapping[str, Format] = MappingProxyType(_catalogue())
"""The formats in use. `get_format` also accepts any other block size that the name grammar can say."""


def get_format(name: str | Format) -> Format:
    """The format of that name, e.g. "fp8_128x128_ue8m0" or "fp8_64x256".

    Raises UnknownNameError with the nearest names.
    """
    if isinstance(name, Format):
        return name
    fmt = _known.get(name)  # a dict and no functools.cache, about which torch.compile warns
    if fmt is None:
        fmt = _build(name) if isinstance(name, str) else None
        if fmt is None:
            raise UnknownNameError("format", str(name), FORMATS)
        _known[name] = fmt
    return fmt


_known: dict[str, Format] = dict(FORMATS)
