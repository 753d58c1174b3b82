"""Write one safetensors shard, piece by piece and atomically.

The header comes first, so shapes must be known before data: a shard is laid out from its specs, and pieces of any
tensor may then arrive in turn. The file gets its name only when every byte is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .byteio import ByteReader, ByteWriter, byte_view
from .checksum import Checksum
from .header import DTYPES, read_header

PARTIAL = ".partial"
_METADATA = {"format": "pt"}
_PIECE = 1 << 20
"""Bytes read at a time when a shard's checksums are made again."""
_SMALL = 1 << 16
"""Bytes. Scales come in pieces of a few bytes for each slab: they are written together."""


_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
"""Of dtypes in a file, as safetensors 0.8 writes it."""
_RANK = {code: i for i, code in enumerate(_ORDER)}


@dataclass(frozen=True)
class Spec:
    """A tensor to be written. dtype: safetensors' code."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass
class _Waiting:
    """Small pieces of a tensor that are not written yet. size: bytes."""

    pieces: list[Tensor] = field(default_factory=list)
    size: int = 0


class ShardWriter:
    """Writes the tensors of a shard; a context manager. Leaving it by an exception leaves nothing; a kill, `*.partial`.

    Tensors lie in the order of the safetensors library, by dtype and name, so every one is aligned and the file is
    the one that `save_file` would write. The bytes depend on the specs alone, not on the order in which pieces arrive.
    """

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        self.path = path
        ordered = sorted(specs, key=lambda s: (_RANK[s.dtype], s.name.encode()))
        entries: dict[str, Any] = {"__metadata__": _METADATA}
        offset = 0
        for spec in ordered:
            end = offset + spec.nbytes
            entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        if len(entries) != len(ordered) + 1:
            raise CheckpointError(f"{path}: a tensor name appears twice")
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._at = {s.name: len(self._head) + entries[s.name]["data_offsets"][0] for s in ordered}
        self._left = {s.name: s.nbytes for s in ordered}
        self._sums: dict[str, Checksum] = {}
        self._done: dict[str, str] = {s.name: Checksum().hexdigest() for s in ordered if not s.nbytes}
        self._waiting: dict[str, _Waiting] = {}
        self.size = len(self._head) + offset
        self._fd = -1
        self._out = ByteWriter(-1)

    def __enter__(self) -> ShardWriter:
        """Raises OSError when the disk has no room for the whole shard."""
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            with naming(self.path):
                self._take_room()
                self._out = ByteWriter(self._fd)
                self._out.write(self._head, 0)
        except BaseException:
            self._abandon()
            raise
        return self

    def _take_room(self) -> None:
        """So that a full disk says so now; and writing is quicker."""
        try:
            os.posix_fallocate(self._fd, 0, self.size)
        except OSError as e:
            if e.errno != errno.ENOSPC:
                raise
            free = shutil.disk_usage(self.path.parent).free
            raise OSError(e.errno, f"{e.strerror}, needs {self.size} bytes, {free} are free") from e

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{os.getpid()}{PARTIAL}")

    def write(self, name: str, piece: Tensor) -> None:
        """Append the bytes of `piece` (any dtype) to the tensor `name`. Small pieces are gathered first."""
        flat = piece.contiguous().reshape(-1).view(torch.uint8)
        size = flat.numel()
        if size > self._left[name]:
            raise CheckpointError(f"{self.path}: {name}: {size} bytes for the last {self._left[name]}")
        self._left[name] -= size
        waiting = self._waiting.setdefault(name, _Waiting())
        if size >= _SMALL and not waiting.pieces:
            self._append(name, flat)
            return
        waiting.pieces.append(flat.clone())  # its memory may be the reader's buffer
        waiting.size += size
        if self._left[name] == 0 or waiting.size >= _SMALL:
            del self._waiting[name]
            self._append(name, torch.cat(waiting.pieces))

    def _append(self, name: str, flat: Tensor) -> None:
        with naming(self.path):
            self._out.write(byte_view(flat), self._at[name])
        self._at[name] += flat.numel()
        if name not in self._sums:
            self._sums[name] = Checksum()
        self._sums[name].update(flat)
        if self._left[name] == 0:
            self._done[name] = self._sums.pop(name).hexdigest()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            if missing := [name for name, left in self._left.items() if left]:
                raise CheckpointError(f"{self.path}: {missing[0]}: {self._left[missing[0]]} bytes were not written")
            with naming(self.path):
                os.fsync(self._fd)
        except BaseException:
            self._abandon()
            raise
        os.close(self._fd)
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)

    def _abandon(self) -> None:
        """Give the room back: a full disk may be why."""
        os.close(self._fd)
        self._temporary.unlink(missing_ok=True)

    def checksums(self) -> dict[str, str]:
        """Of every tensor's bytes, and of the header under "" """
        return {"": hashlib.sha256(self._head).hexdigest()} | {name: self._done[name] for name in self._at}


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Calls on a file descriptor fail without a file name ("No space left on device"): say which file it was."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise


def shard_checksums(path: Path) -> dict[str, str]:
    """`ShardWriter.checksums` of a file that is there, from its bytes. Raises CheckpointError for a damaged header."""
    tensors = read_header(path).tensors
    with path.open("rb") as f:
        head = f.read(8)
        head += f.read(int.from_bytes(head, "little"))
    found = {"": hashlib.sha256(head).hexdigest()}
    for info in tensors:
        total = Checksum()
        with ByteReader(info) as reader:
            for begin in range(0, info.nbytes, _PIECE):
                total.update(reader.read(begin, min(begin + _PIECE, info.nbytes)))
        found[info.name] = total.hexdigest()
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file, atomically and durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + PARTIAL)
    with naming(path), temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """A small file, atomically and durably."""
    temporary = target.with_name(target.name + PARTIAL)
    with naming(target):
        shutil.copyfile(source, temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
    temporary.replace(target)


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut, where the file system can."""
    fd = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(fd)
    os.close(fd)


def index_of(shards: Iterable[tuple[str, Sequence[Spec]]]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    weight_map, total = {}, 0
    for file, specs in shards:
        for spec in specs:
            weight_map[spec.name] = file
            total += spec.nbytes
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
