"""A quantized weight as the tensors that a checkpoint style stores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError, ScaleError, UnknownNameError
from ..formats import Format
from ..layouts import decode_scale, encode_e8m0
from ..numerics import DEFAULT_FLOOR
from ..reference import block_amax, round_scale, to_blocks
from ..tensor import BlockScaled
from .header import DTYPES, dtype_code
from .names import Parts, Style, get_style
from .writer import Spec

SCALE_DTYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16", "e8m0": "F8_E8M0", "u8": "U8", "e4m3": "F8_E4M3"}
"""Words of `--scale-dtype` -> safetensors' codes. u8 is the byte of E8M0 under another name."""


@dataclass(frozen=True)
class Encoding:
    """format, style and scale storage dtype (safetensors' code): everything that fixes a weight's bytes on disk."""

    format: Format
    style: Style
    scale_dtype: str

    @property
    def data_dtype(self) -> str:
        if self.format.packed:
            return "I8" if self.style.name == "deepseek_v4" and not self.format.two_level else "U8"
        return dtype_code(self.format.element.dtype)

    def parts(self, module: str, static: bool = False, stacked: bool = False) -> Parts:
        fmt = self.format
        return self.style.parts(module, packed=fmt.packed, two_level=fmt.two_level, static=static, stacked=stacked)

    def specs(self, module: str, shape: tuple[int, ...], static: bool = False) -> tuple[Spec, ...]:
        """The tensors for a weight of logical `shape` (n, k): data, scale, global scale, input scale."""
        names = self.parts(module, static, stacked=len(shape) > 2)
        rows, cols = shape[-2:]
        if names.blocked and cols % 32:
            raise CheckpointError(
                f"{module}: style {self.style.name} needs a multiple of 32 columns, got {list(shape)}"
            )
        stored = (rows, cols // 32, 16) if names.blocked else self.format.data_shape(rows, cols)
        data = Spec(names.data, self.data_dtype, (*shape[:-2], *stored))
        scale = Spec(names.scale, self.scale_dtype, self.scale_shape(shape))
        level = (Spec(n, "F32", shape[:-2]) for n in (names.global_scale, names.input_scale) if n)
        return (data, scale, *level)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored scale: each style has a way of its own for grids that are not matrices of blocks."""
        grid = self.format.scale_shape(*shape[-2:])
        lead = shape[:-2]
        if self.format.block == (None, None):
            return (*lead, 1) if self.style.name == "compressed_tensors" else lead
        if self.style.name == "modelopt" and (self.format.block[0] or 0) > 1:
            return (*lead, grid[0], 1, grid[1], 1)
        if self.style.name == "modelopt" and self.format.block[1] is None:
            return (*lead, grid[0])
        return (*lead, *grid)

    def tensors(self, module: str, q: BlockScaled, stacked: bool = False) -> dict[str, Tensor]:
        """The tensors by name. Raises ScaleError when a scale cannot be stored exactly."""
        names = self.parts(module, q.input_scale is not None, stacked)
        found = {
            names.data: q.data.view(DTYPES[self.data_dtype]),
            names.scale: store_scale(q.scale, self.scale_dtype).reshape(self.scale_shape(q.shape)),
        }
        for name, value in ((names.global_scale, q.global_scale), (names.input_scale, q.input_scale)):
            if name is not None and value is not None:
                found[name] = _inverse(value.float(), name) if names.inverse else value.float()
        return found


def make_encoding(fmt: Format, style: str | None = None, scale_dtype: str | None = None) -> Encoding:
    """The way a format is usually stored, or as asked. style: a name of `names.STYLES`. scale_dtype: see SCALE_DTYPES.

    Raises UnknownNameError, or CheckpointError for a scale dtype that the format does not have.
    """
    chosen = get_style(style or _usual_style(fmt))
    if scale_dtype is None:
        code = _usual_scale_dtype(fmt, chosen)
    elif scale_dtype in SCALE_DTYPES:
        code = SCALE_DTYPES[scale_dtype]
    else:
        raise UnknownNameError("scale dtype", scale_dtype, SCALE_DTYPES)
    stored = torch.float8_e8m0fnu if code == "U8" else DTYPES[code]
    if stored not in fmt.scale_dtypes:
        raise CheckpointError(f"{fmt}: scales are stored in one of {list(map(str, fmt.scale_dtypes))}, got {code}")
    return Encoding(fmt, chosen, code)


def _usual_style(fmt: Format) -> str:
    if fmt.two_level:
        return "modelopt"
    if fmt.name == "mxfp4" or (fmt.block[1] is None and fmt.scale_rounding == "none"):
        return "compressed_tensors"
    return "deepseek"


def _usual_scale_dtype(fmt: Format, style: Style) -> str:
    if fmt.two_level:
        return "F8_E4M3"
    if fmt.scale_rounding == "none":
        return "F32"
    if style.name == "deepseek_v4":
        return "F8_E8M0"
    if fmt.scale_rounding == "pow2_floor":
        return "U8"
    return "F8_E8M0" if fmt.block == (32, 32) else "F32"  # V4.1 and V3.1


def store_scale(scale: Tensor, code: str) -> Tensor:
    """The same scales in another storage dtype, exactly. Raises ScaleError when a value would change."""
    if dtype_code(scale.dtype) == code:
        return scale
    value = decode_scale(scale)
    if code in ("F8_E8M0", "U8"):
        return encode_e8m0(value).view(DTYPES[code])
    stored = value.to(DTYPES[code])
    changed = (stored.float() != value) & ~value.isnan()
    if changed.any():
        raise ScaleError(
            f"scale {value[changed][0]:g} is not exact in {code} ({int(changed.sum())} of {scale.numel()} scales)"
        )
    return stored


def _inverse(value: Tensor, name: str) -> Tensor:
    """An fp32 `y` with `1 / y == value`: compressed-tensors stores inverses. Raises ScaleError when there is none."""
    near = (1 / value.double()).float()
    candidates = (near, torch.nextafter(near, near * 2), torch.nextafter(near, near * 0))
    exact = torch.stack([1 / c == value for c in candidates])
    if not bool(exact.any(0).all()):
        raise ScaleError(f"{name}: no fp32 number has the inverse {value.flatten()[0]:.9g}")
    return torch.where(exact[0], candidates[0], torch.where(exact[1], candidates[1], candidates[2]))


def storable_scale(x: Tensor, encoding: Encoding) -> Tensor | None:
    """For `x: [rows, cols]`: dynamic scales that the 16-bit storage dtype holds; None where storage is exact anyway."""
    if encoding.scale_dtype not in ("BF16", "F16"):
        return None
    fmt = encoding.format
    amax = block_amax(to_blocks(x.float(), fmt)).clamp(min=DEFAULT_FLOOR)
    return round_scale(amax, fmt, fmt.scale_rounding).to(DTYPES[encoding.scale_dtype])


def storable_global_scale(amax: Tensor, encoding: Encoding) -> Tensor:
    """NVFP4's second level for a matrix with this largest magnitude, as a reader of the style will see it."""
    level = amax / (448.0 * encoding.format.max)
    level = torch.where(level > 0, level, 1.0)
    return 1 / (1 / level) if encoding.style.inverse else level
