"""Tensors to work on, a slab of rows at a time, so that memory does not grow with the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from .byteio import ByteReader
from .checksum import Checksum
from .header import TensorInfo
from .stacks import matrices

SLAB = 1 << 20
"""Elements read at a time (2 MB of BF16): what is read is still in a cache when it is quantized, summed
and written; a tenth as much would be all overhead, four times as much falls out of caches and costs memory."""


class SourceTensor(Protocol):
    """A matrix `[rows, cols]` (leading dimensions folded into rows) that is read by rows."""

    @property
    def path(self) -> Path:
        """The file that it is in."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str:
        """safetensors' code of what `stream` yields."""

    @property
    def nbytes(self) -> int: ...
    def matrices(self) -> Iterator[SourceTensor]:
        """The matrices of a stack, each a tensor of its own; a matrix is its only one."""

    def stream(self, multiple: int = 1, again: bool = False) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows `[n, cols]`) of each of `slabs`, in order; overwritten when the next are asked for.

        again: the tensor will be streamed once more.
        """


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a safetensors file."""

    info: TensorInfo

    @property
    def path(self) -> Path:
        return self.info.file

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

    def matrices(self) -> Iterator[FileTensor]:
        yield from map(FileTensor, matrices(self.info))

    def stream(self, multiple: int = 1, again: bool = False) -> Iterator[tuple[int, Tensor]]:
        rows, cols = folded(self.info.shape)
        width = self.info.nbytes // rows if rows else 0
        with ByteReader(self.info, again) as reader:
            for begin, end in slabs(self.info.shape, multiple):
                piece = reader.read(begin * width, end * width).view(self.info.torch_dtype)
                yield begin, piece.reshape(end - begin, cols)


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
    for _, piece in tensor.stream(multiple):
        total.update(piece)
    return total.hexdigest()
