"""A block-scaled tensor: data, scale, format and layout travel together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import DtypeError, ShapeError
from .formats import Format, get_format


@dataclass(frozen=True, eq=False, repr=False)
class BlockScaled:
    """`x ≈ data * scale`, as stored. A plain frozen container, not a Tensor subclass.

    data: `[..., rows, cols]` in the element's dtype; FP4 is packed, `[..., rows, cols / 2]` bytes.
    scale: `[..., grid rows, grid cols]` in one of `format.scale_dtypes`; it multiplies.
    format: a `Format`, or its name.
    layout: the name of how data and scale sit in memory (`layouts.LAYOUTS`); shapes above are "row"'s.
    shape: the logical `[..., rows, cols]` in elements.
    global_scale: fp32, one number or one per leading index; multiplies every block scale (NVFP4 only).
    input_scale: fp32, likewise: the static activation scale stored beside the weight, if any.

    Raises ShapeError or DtypeError when the parts do not fit together.
    """

    data: Tensor
    scale: Tensor
    format: Format
    layout: str = "row"
    shape: tuple[int, ...] = ()
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None
    bound: ClassVar[Any] = None
    """What the last `linear` with this weight found out (`shortcut.Bound`); no part of the value."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get_format(self.format))
        if not self.shape:
            *lead, cols = self.data.shape
            object.__setattr__(self, "shape", (*lead, cols * 2 if self.format.packed else cols))
        else:
            object.__setattr__(self, "shape", tuple(self.shape))
        if self.layout == "row":
            self._check_row()
        self._check_extras()

    def _check_row(self) -> None:
        fmt, data, scale = self.format, self.data, self.scale
        allowed = (torch.uint8, torch.int8) if fmt.packed else (fmt.element.dtype,)
        if data.dtype not in allowed:
            raise DtypeError(f"{fmt}: data needs {' or '.join(map(str, allowed))}, got {data.dtype}")
        if scale.dtype not in fmt.scale_dtypes:
            raise DtypeError(f"{fmt}: scale needs one of {list(map(str, fmt.scale_dtypes))}, got {scale.dtype}")
        if len(self.shape) < 2:
            raise ShapeError(f"{fmt}: needs at least two dimensions, got shape {list(self.shape)}")
        *lead, rows, cols = self.shape
        want_data = (*lead, *fmt.data_shape(rows, cols))
        if tuple(data.shape) != want_data:
            raise ShapeError(f"{fmt}: shape {list(self.shape)} needs data {list(want_data)}, got {list(data.shape)}")
        want = (*lead, *fmt.scale_shape(rows, cols))
        if tuple(scale.shape) != want:
            raise ShapeError(f"{fmt}: data {list(self.shape)} needs scale {list(want)}, got {list(scale.shape)}")

    def _check_extras(self) -> None:
        """Kernels read one number, or one for each matrix of a stack, without another look."""
        fmt, lead = self.format, self.shape[:-2]
        if fmt.two_level is not (self.global_scale is not None):
            got = "none" if self.global_scale is None else f"one {list(self.global_scale.shape)}"
            raise ShapeError(f"{fmt}: needs {'a' if fmt.two_level else 'no'} global_scale, got {got}")
        for name, t in (("global_scale", self.global_scale), ("input_scale", self.input_scale)):
            if t is None:
                continue
            if not t.dtype.is_floating_point or t.element_size() == 1:
                raise DtypeError(f"{fmt}: {name} needs float32, got {t.dtype}")
            if t.numel() != 1 and tuple(t.shape) != lead:
                raise ShapeError(
                    f"{fmt}: shape {list(self.shape)} needs {name} [] or {list(lead)}, got {list(t.shape)}"
                )

    @classmethod
    def trusted(
        cls,
        data: Tensor,
        scale: Tensor,
        format: Format,
        layout: str,
        shape: tuple[int, ...],
        global_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
    ) -> BlockScaled:
        """The same container without its checks, for parts that were checked before: ops rebuild one a call."""
        self = object.__new__(cls)
        self.__dict__.update(
            data=data,
            scale=scale,
            format=format,
            layout=layout,
            shape=shape,
            global_scale=global_scale,
            input_scale=input_scale,
        )
        return self

    @property
    def nbytes(self) -> int:
        """Bytes held: data, scales and the fp32 extras."""
        parts = (self.data, self.scale, self.global_scale, self.input_scale)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> BlockScaled:
        """The same bytes on another device."""
        move = {
            n: t.to(device)
            for n in ("data", "scale", "global_scale", "input_scale")
            if (t := getattr(self, n)) is not None
        }
        return replace(self, **move)

    def __getitem__(self, index: int) -> BlockScaled:
        """One matrix of a stacked tensor (one expert of `[E, N, K]`)."""
        if len(self.shape) < 3:
            raise ShapeError(
                f"{self.format}: only stacked tensors [E, rows, cols] can be indexed, got {list(self.shape)}"
            )
        extras = {}
        for name in ("global_scale", "input_scale"):
            t = getattr(self, name)
            extras[name] = t if t is None or t.numel() == 1 else t[index]
        return replace(self, data=self.data[index], scale=self.scale[index], shape=self.shape[1:], **extras)

    def __repr__(self) -> str:
        where = f"layout={self.layout!r}, scale={self.scale.dtype}, device={self.device}"
        return f"BlockScaled({self.format}, {list(self.shape)}, {where})"
