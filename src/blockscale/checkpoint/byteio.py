"""Bytes out of and into files, a piece at a time, without filling the page cache.

A model to convert is read once and written once, and is often larger than memory. Pages of it that stay in the page
cache push out what others need there, and getting fresh pages costs as much as all else together. Linux 6.14 can
drop them as soon as they are used (`RWF_DONTCACHE`), those apart that were in the cache before, and starts to write
at once, so that the `fsync` at the end has nothing left to do. Older systems do without.
"""

from __future__ import annotations

import errno
import os
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import CheckpointError
from .header import TensorInfo

_DONTCACHE = 0x80
"""`RWF_DONTCACHE`, which `os` has no name for yet."""
_UNKNOWN = (errno.EOPNOTSUPP, errno.EINVAL)
"""What kernels and file systems say that do not know it."""
_WINDOW = 2 << 20
"""Bytes. The cache drops blocks of up to this size, which lie at multiples of their size, as soon as a part was read,
and would have to read the other part again: only whole windows are read that way, the ends of a tensor as usual."""


def byte_view(t: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared and not copied."""
    return memoryview(cast(Any, t.reshape(-1).view(torch.uint8).numpy()))


class ByteReader:
    """Ranges of one tensor's bytes, one after the other, through one file handle and one buffer: a context manager.

    Reading, not mapping: pages of a mapped file count as this process's memory, and a file that shrinks kills it.
    again: the bytes will be read once more, so leave them in the page cache.
    """

    def __init__(self, info: TensorInfo, again: bool = False) -> None:
        self._info = info
        self._flags = 0 if again else _DONTCACHE
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._low = self._high = info.start  # of the file: what the buffer holds, from its front on
        self._fd = -1

    def __enter__(self) -> ByteReader:
        self._fd = os.open(self._info.file, os.O_RDONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def read(self, begin: int, end: int) -> Tensor:
        """Bytes `begin … end` as uint8, overwritten by the next call. Raises CheckpointError for a file that ends."""
        first, last = self._info.start + begin, self._info.start + end
        assert last <= self._info.end, f"{self._info}: asked for {begin} … {end}"
        if not self._low <= first <= self._high:
            self._low = self._high = first
        if last - self._low > self._buffer.numel():
            self._make_room(first, last)
        while self._high < last:
            self._fill(last)
        return self._buffer[first - self._low : last - self._low]

    def _make_room(self, first: int, last: int) -> None:
        """What is held from `first` on goes to the front of a buffer that also holds `last`, and the end of its window.

        A larger one would move less and be slower: what is read shall still be in a processor's cache when it is used.
        """
        left = self._buffer[first - self._low : self._high - self._low]
        wanted = min(last - first + _WINDOW, self._info.end - first)
        buffer = self._buffer if self._buffer.numel() >= wanted else torch.empty(wanted, dtype=torch.uint8)
        if left.numel():
            if left.numel() > first - self._low and buffer is self._buffer:
                left = left.clone()  # the two places overlap
            buffer[: left.numel()].copy_(left)
        self._buffer, self._low = buffer, first

    def _fill(self, last: int) -> None:
        """Read on: up to the next window, or the whole windows up to the one that ends behind `last`."""
        begin = self._high
        limit = min(self._info.end, self._low + self._buffer.numel())
        whole = min(-(-last // _WINDOW), limit // _WINDOW) * _WINDOW
        if begin % _WINDOW == 0 and whole > begin:
            self._read(begin, whole, self._flags)
        else:
            self._read(begin, min(limit, (begin // _WINDOW + 1) * _WINDOW), 0)

    def _read(self, begin: int, end: int, flags: int) -> None:
        view = byte_view(self._buffer[begin - self._low : end - self._low])
        try:
            n = os.preadv(self._fd, [view], begin, flags)
        except OSError as e:
            if not flags or e.errno not in _UNKNOWN:
                raise
            self._flags, n = 0, os.preadv(self._fd, [view], begin)
        if not n:
            raise CheckpointError(
                f"{self._info.file}: {self._info.name}: the file ended at byte {begin}, needs {self._info.end}"
            )
        self._high += n


def read_bytes(info: TensorInfo, begin: int = 0, end: int | None = None) -> Tensor:
    """Bytes `begin … end` of a tensor, read (not mapped, so they do not stay in this process's memory): uint8.

    Raises CheckpointError when the file has become shorter.
    """
    with ByteReader(info) as reader:
        return reader.read(begin, info.nbytes if end is None else end)


class ByteWriter:
    """Writes at any place of an open file. The descriptor stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd, self._flags = fd, _DONTCACHE

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """All of `data` at byte `offset`. Raises OSError without a file name."""
        view = memoryview(data)
        while view:
            try:
                n = os.pwritev(self._fd, [view], offset, self._flags)
            except OSError as e:
                if not self._flags or e.errno not in _UNKNOWN:
                    raise
                self._flags = 0
                continue
            view, offset = view[n:], offset + n


def keep_freed_memory() -> None:
    """glibc gives large blocks back to the system when they are freed, and gets them again, page by page, for the next
    slab: a fifth of all time. Once it has seen a large block freed it keeps smaller ones (`mallopt(3)`, dynamic mmap
    threshold, at most 32 MB). The block is never touched, so it costs no memory."""
    torch.empty(31 << 20, dtype=torch.uint8)
