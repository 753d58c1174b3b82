"""What can be done to one tensor on its way into a shard.

A step knows what it will write before it reads anything, so a shard can be laid out; it then streams slabs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .. import ops, reference
from ..layouts import decode_scale
from ..numerics import DEFAULT_FLOOR
from ..tensor import BlockScaled
from .checksum import Checksum
from .encode import Encoding, storable_global_scale, storable_scale
from .errors import NotFiniteError
from .header import DTYPES
from .names import module_of
from .search import searched_scale
from .source import SourceTensor, checksum, slabs
from .stacks import FLOATS
from .stats import Stats
from .writer import Spec

Write = Callable[[str, Tensor], None]
Report = Literal["sample", "full", "none"]
Advance = Callable[[int], None]
"""Told the bytes of the source that were just dealt with."""


class Step(Protocol):
    """One tensor's way. name: for progress and messages. nbytes: read from the source."""

    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def outputs(self) -> tuple[Spec, ...]: ...
    def run(self, write: Write, advance: Advance) -> dict[str, Any]:
        """Read, compute, write; returns the record for manifest and report, with a "checksum" of the source."""

    def checksum(self) -> str:
        """The checksum that `run` would record now."""


@dataclass(frozen=True)
class Copy:
    """A tensor as it is, perhaps under another name or in another float dtype. left: why it was not quantized, where
    one would expect that it is."""

    source: SourceTensor
    rename: str | None = None
    dtype: str | None = None
    left: str = ""

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def outputs(self) -> tuple[Spec, ...]:
        return (Spec(self.rename or self.source.name, self.dtype or self.source.dtype, self.source.shape),)

    def run(self, write: Write, advance: Advance) -> dict[str, Any]:
        total, (out,) = Checksum(), self.outputs
        for _, piece in self.source.stream():
            total.update(piece)
            write(out.name, piece if self.dtype is None else piece.to(DTYPES[self.dtype]))
            advance(piece.numel() * piece.element_size())
        record = {"name": out.name, "step": "copy", "checksum": total.hexdigest()}
        return record | ({"left": self.left, "shape": list(out.shape)} if self.left else {})

    def checksum(self) -> str:
        return checksum(self.source)


@dataclass(frozen=True)
class Quantize:
    """A float matrix, or a stack of them, to block-scaled tensors: bytes equal to `reference.quantize` of each matrix.

    keep_nan: store NaN and infinities as the format does, instead of refusing. search: MSE-searched scales.
    report: measure a "sample" of the elements, all ("full"), or "none".
    """

    source: SourceTensor
    encoding: Encoding
    keep_nan: bool = False
    search: bool = False
    report: Report = "sample"
    rename: str | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def module(self) -> str:
        return module_of(self.rename or self.source.name)

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def outputs(self) -> tuple[Spec, ...]:
        return self.encoding.specs(self.module, self.source.shape)

    @property
    def _multiple(self) -> int:
        """Slabs end on block boundaries."""
        return self.encoding.format.block[0] or 1

    def run(self, write: Write, advance: Advance) -> dict[str, Any]:
        fmt, shape, names = (
            self.encoding.format,
            self.source.shape,
            self.encoding.parts(self.module, stacked=self._stacked),
        )
        sources = list(self.source.matrices())
        stats, total, i = None, Checksum(), 0
        if self.report != "none":
            count = sum(1 for source in sources for _ in slabs(source.shape, self._multiple))
            stats = Stats(math.prod(shape), count, self.report == "full")
        for source in sources:
            whole = self._whole_scale(source)
            for begin, x in source.stream(self._multiple):
                total.update(x)
                q = self._quantize(x, whole)
                self._check_finite(source, x, q, begin)
                if stats is not None:
                    stats.add(x, q, i)
                parts = self.encoding.tensors(self.module, q, self._stacked)
                write(names.data, parts[names.data])
                if begin == 0 or fmt.block[0] is not None:
                    write(names.scale, parts[names.scale])
                if begin == 0 and names.global_scale:
                    write(names.global_scale, parts[names.global_scale])
                advance(x.numel() * x.element_size())
                i += 1
        record = {"name": self.module, "step": "quantize", "format": fmt.name, "shape": list(shape)}
        return record | {"checksum": total.hexdigest()} | (stats.result() if stats is not None else {})

    @property
    def _stacked(self) -> bool:
        return len(self.source.shape) > 2

    def checksum(self) -> str:
        return checksum(self.source, self._multiple)

    def _quantize(self, x: Tensor, whole: Tensor | None) -> BlockScaled:
        fmt = self.encoding.format
        if fmt.two_level:
            scale = searched_scale(x, self.encoding, whole) if self.search else None
            return reference.quantize(x, fmt, scale=scale, global_scale=whole)
        if self.search:
            scale = searched_scale(x, self.encoding)
        else:
            scale = storable_scale(x, self.encoding) if whole is None else whole.to(_given_dtype(self.encoding))
        return ops.quantize(x, fmt, scale=scale)

    def _whole_scale(self, source: SourceTensor) -> Tensor | None:
        """What must be known of the whole matrix before its first slab: NVFP4's global scale, a per-tensor scale."""
        fmt = self.encoding.format
        if not fmt.two_level and fmt.block[0] is not None:
            return None
        amax = torch.zeros(())
        for _, x in source.stream(self._multiple, again=True):
            magnitude = x.float().abs()
            amax = torch.maximum(amax, torch.where(magnitude < torch.inf, magnitude, 0.0).amax())
        if fmt.two_level:
            return storable_global_scale(amax, self.encoding)
        scale = reference.round_scale(amax.clamp(min=DEFAULT_FLOOR), fmt, fmt.scale_rounding)
        return reference.store_scale(scale.reshape(1, 1), fmt)

    def _check_finite(self, source: SourceTensor, x: Tensor, q: BlockScaled, first_row: int) -> None:
        """NaN and infinities show in the result, which has fewer bytes to look at; only then is the slab searched."""
        if self.keep_nan or not _holds_nan(q):
            return
        bad = ~x.isfinite()
        if bad.any():
            row, col = bad.nonzero()[0].tolist()
            fmt = q.format
            raise NotFiniteError(
                f"{source.path}: {source.name}: {x[row, col].item()} at [{first_row + row}, {col}] "
                f"({int(bad.sum())} such elements in its slab); "
                + (f"{fmt} has no NaN" if fmt.packed else "--nan keep stores them as NaN")
            )


def _holds_nan(q: BlockScaled) -> bool:
    """Whether an element, or in FP4 a scale, has the code for NaN."""
    if q.format.packed:
        return bool(decode_scale(q.scale).isnan().any())
    byte = q.data.view(torch.int8)
    return int(byte.max()) == 0x7F if q.format.element.nan == 0x7F else int(byte.min()) == -0x80


def _given_dtype(encoding: Encoding) -> torch.dtype:
    return torch.float8_e8m0fnu if encoding.scale_dtype == "U8" else DTYPES[encoding.scale_dtype]


def is_matrix(source: SourceTensor) -> bool:
    """Whether a tensor can be block-scaled at all: a non-empty float matrix."""
    return len(source.shape) == 2 and 0 not in source.shape and source.dtype in FLOATS
