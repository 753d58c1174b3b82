"""Tensors to work on, a slab of rows at a time, so that memory does not grow with the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .checksum import Checksum
from .files import read_bytes
from .header import TensorInfo

SLAB = 1 << 22
"""Elements read at a time (8 MB of BF16): large enough for a kernel, small enough for caches."""


class SourceTensor(Protocol):
    """A matrix `[rows, cols]` (leading dimensions folded into rows) that can be read by rows."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str:
        """safetensors' code of what `read` returns."""

    @property
    def nbytes(self) -> int: ...
    def read(self, begin: int, end: int) -> Tensor:
        """Rows `begin … end` as `[end - begin, cols]`."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a safetensors file."""

    info: TensorInfo

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def nbytes(self) -> int:
        return self.info.nbytes

    def read(self, begin: int, end: int) -> Tensor:
        rows, cols = folded(self.info.shape)
        width = self.info.nbytes // rows if rows else 0
        return read_bytes(self.info, begin * width, end * width).view(self.info.torch_dtype).reshape(-1, cols)


def folded(shape: tuple[int, ...]) -> tuple[int, int]:
    """`[..., rows, cols]` as one matrix; vectors and scalars are one row."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, math.prod(shape))


def slabs(shape: tuple[int, ...], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of about SLAB elements, each but the last a multiple of `multiple` rows. Shape alone decides."""
    rows, cols = folded(shape)
    step = max(1, SLAB // max(1, cols * multiple)) * multiple
    yield from ((r, min(r + step, rows)) for r in range(0, rows, step))


def checksum(tensor: SourceTensor, multiple: int = 1) -> str:
    """`Checksum` of a whole source tensor, read in the slabs that a step with this `multiple` reads."""
    total = Checksum()
    for begin, end in slabs(tensor.shape, multiple):
        total.update(tensor.read(begin, end))
    return total.hexdigest()
