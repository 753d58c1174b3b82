"""The safetensors header, read with suspicion.

A file is `u64 length | JSON | data`. Everything that the JSON claims is checked against the file before one byte of
data is touched: sizes, order, overlaps, holes, names and dtypes. Nothing here can execute what it reads.

Source: the safetensors format description (`dtype`, `shape`, `data_offsets`, no holes, 100 MB of header at most).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, DtypeError

MAX_HEADER = 100_000_000
"""Bytes. The limit of the safetensors library; larger headers exist only in attacks."""

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_BITS = {code: dtype.itemsize * 8 for code, dtype in DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def dtype_code(dtype: torch.dtype) -> str:
    """safetensors' word for a torch dtype. Raises DtypeError when it has none."""
    if dtype not in _CODES:
        raise DtypeError(f"safetensors: needs one of {sorted(_CODES.values())}, got {dtype}")
    return _CODES[dtype]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header describes it.

    dtype: safetensors' code, e.g. "F8_E4M3". start, end: byte range in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise DtypeError(f"{self.file.name}: {self.name}: torch has no dtype for {self.dtype}")
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Header:
    """Every tensor of one file, in file order, and the free-form metadata."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises CheckpointError naming file and tensor. Errors of the operating system (no such file, no permission) pass.
    """
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        prefix = f.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: truncated: {size} bytes, a safetensors file has at least 8")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            other = "" if path.suffix == ".safetensors" else "; needs a safetensors file"
            raise CheckpointError(f"{path}: header claims {length} bytes, at most {MAX_HEADER} are allowed{other}")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated: header claims {length} bytes, the file has {size - 8} after it")
        return parse_header(f.read(length), size, path)


def parse_header(text: bytes, size: int, path: Path) -> Header:
    """Check the JSON `text` of a file of `size` bytes. Raises CheckpointError."""
    entries = _load(text, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ needs an object of strings")
    base = 8 + len(text)
    tensors = sorted((_tensor(n, e, base, size, path) for n, e in entries.items()), key=lambda t: (t.start, t.end))
    expected = base
    for tensor in tensors:
        if tensor.start != expected:
            what = "overlaps the tensor before it" if tensor.start < expected else "leaves a hole before it"
            raise CheckpointError(f"{path}: {tensor.name}: data starts at byte {tensor.start}, {what} ({expected})")
        expected = tensor.end
    if expected != size:
        raise CheckpointError(f"{path}: tensors end at byte {expected}, the file has {size}")
    return Header(tuple(tensors), metadata)


def _load(text: bytes, path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path}: header is not JSON as safetensors writes it: {_short(e)}") from e
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: header needs a JSON object, got {type(entries).__name__}")
    return entries


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"name {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def _tensor(name: str, entry: Any, base: int, size: int, path: Path) -> TensorInfo:
    where = f"{path}: {name[:200]}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs dtype, shape and data_offsets, got {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where}: unknown dtype {_short(dtype)}; known: {', '.join(_BITS)}")
    if not _naturals(shape):
        raise CheckpointError(f"{where}: shape needs a list of non-negative integers, got {_short(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets needs [begin, end], got {_short(offsets)}")
    start, end = base + offsets[0], base + offsets[1]
    if end > size:
        raise CheckpointError(f"{where}: data ends at byte {end}, the file has {size} (truncated, or the header lies)")
    if math.prod(max(1, size) for size in shape) >= 1 << 62:
        raise CheckpointError(f"{where}: shape is beyond any memory: {_short(shape)}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != (end - start) * 8:
        raise CheckpointError(
            f"{where}: {dtype} {list(shape)} needs {bits / 8:g} bytes, data_offsets has {end - start}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start, end)


def _naturals(value: Any) -> bool:
    """A list of integers in 0 … 2^62, few enough to be a shape."""
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _short(value: object) -> str:
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
