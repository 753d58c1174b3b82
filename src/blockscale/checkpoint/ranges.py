"""Rectangles out of safetensors files, and nothing else of them: what one rank of many reads.

`pread` and not the mapped file: a page that is touched is read whole, and the kernel reads ahead, so a map would
fetch the neighbours' bytes too. Every byte that is asked for is counted.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..errors import CheckpointError
from .byteio import byte_view
from .header import TensorInfo


class RangeReader:
    """Reads parts of tensors. bytes_read: all bytes that were read so far. A context manager; not thread-safe."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def tensor(self, info: TensorInfo) -> Tensor:
        """The whole tensor."""
        return self._read(info, 0, info.nbytes).view(info.torch_dtype).reshape(info.shape)

    def rectangle(
        self, info: TensorInfo, rows: tuple[int, int], cols: tuple[int, int], grid: tuple[int, int] | None = None
    ) -> Tensor:
        """`[rows, cols]` of a tensor seen as the matrix `grid` (default: leading dimensions folded into rows).

        rows, cols: first and one past the last. Whole rows come in one read, parts of rows in one read each.
        Raises CheckpointError when the file has become shorter.
        """
        height, width = grid or (math.prod(info.shape[:-1]), info.shape[-1])
        assert height * width == math.prod(info.shape), f"{info}: seen as {height} x {width}"
        size = info.torch_dtype.itemsize
        count, part = rows[1] - rows[0], (cols[1] - cols[0]) * size
        if part == width * size:
            flat = self._read(info, rows[0] * part, rows[1] * part)
        else:
            flat = torch.empty(count * part, dtype=torch.uint8)
            view, fd = byte_view(flat), self._open(info.file)
            start = info.start + cols[0] * size
            for i in range(count):
                self._fill(info, fd, view[i * part : (i + 1) * part], start + (rows[0] + i) * width * size)
        return flat.view(info.torch_dtype).reshape(count, cols[1] - cols[0])

    def _read(self, info: TensorInfo, begin: int, end: int) -> Tensor:
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        if end > begin:
            self._fill(info, self._open(info.file), byte_view(buffer), info.start + begin)
        return buffer

    def _fill(self, info: TensorInfo, fd: int, view: memoryview, start: int) -> None:
        got = 0
        while got < len(view):
            n = os.preadv(fd, [view[got:]], start + got)
            if n == 0:
                raise CheckpointError(f"{info.file}: {info.name}: the file ended after byte {start + got}")
            got += n
        self.bytes_read += got

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]
