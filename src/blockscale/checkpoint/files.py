"""Which files make up a checkpoint folder, and bytes out of them.

A name in an index is data from a stranger: it may only be the plain name of a file in the folder. A symbolic link
may leave the folder in one way only, the way of the Hugging Face cache (`snapshots/<revision>/x -> ../../blobs/y`).
Pickle files are never opened.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .config import load_json
from .header import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r".*-\d+-of-(\d+)\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def list_tensors(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder (or one `.safetensors` file), shards in order, from checked headers.

    Raises CheckpointError for missing shards, an index that disagrees with its shards, and names that leave the folder.
    """
    if path.is_file():
        return {t.name: t for t in read_header(path).tensors}
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint: needs a folder with safetensors files, or one such file")
    index = path / INDEX
    if index.is_file():
        return _indexed(path, index, load_json(index).get("weight_map"))
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        pickles = [p.name for pattern in _PICKLES for p in sorted(path.glob(pattern))]
        hint = f"; {pickles[0]} is a pickle file, which is never read" if pickles else ""
        raise CheckpointError(f"{path}: no safetensors files{hint}")
    for shard in shards:
        if (match := _NUMBERED.fullmatch(shard.name)) and int(match[1]) != len(shards):
            raise CheckpointError(
                f"{path}: {shard.name} says {int(match[1])} shards, found {len(shards)} and no {INDEX}"
            )
    return _union(path, shards)


def _indexed(path: Path, index: Path, weight_map: object) -> dict[str, TensorInfo]:
    if not isinstance(weight_map, Mapping) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map needs an object of file names")
    files = {name: check_member(path, name, index) for name in dict.fromkeys(weight_map.values())}
    found = _union(path, [files[name] for name in sorted(files)])
    for tensor, file in weight_map.items():
        if tensor not in found:
            raise CheckpointError(f"{path / file}: {tensor}: the index says it is here, the shard has no such tensor")
        if found[tensor].file.name != file:
            raise CheckpointError(f"{index}: {tensor}: the index says {file}, it is in {found[tensor].file.name}")
    if extra := next((name for name in found if name not in weight_map), None):
        raise CheckpointError(f"{found[extra].file}: {extra}: in the shard, but not in {INDEX}")
    return found


def _union(path: Path, shards: list[Path]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        check_member(path, shard.name, path)
        for tensor in read_header(shard).tensors:
            if tensor.name in found:
                raise CheckpointError(f"{shard}: {tensor.name}: also in {found[tensor.name].file.name}")
            found[tensor.name] = tensor
    return found


def check_member(folder: Path, name: str, where: Path) -> Path:
    """The file `name` of the folder. Raises CheckpointError when the name or its link leads elsewhere."""
    if not name or name in (".", "..") or any(c in name for c in "/\\\0") or not name.endswith(".safetensors"):
        raise CheckpointError(f"{where}: {name!r:.200} is not the plain name of a safetensors file")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: missing shard (named by {where})")
    real, root = path.resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs"
    if real.parent != root and not (root.parent.name == "snapshots" and real.parent == blobs):
        raise CheckpointError(f"{path}: a link that leaves the checkpoint, to {real}")
    return path


class ShardReader:
    """Bytes of one safetensors file. Thread-safe; opened on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None

    def view(self, info: TensorInfo) -> Tensor:
        """The tensor on the mapped file: no copy, pages are read when touched. Writing to it never reaches the file."""
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.torch_dtype)
        if self._map is None:
            with self.path.open("rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(self._map) < info.end:
            raise CheckpointError(f"{self.path}: {info.name}: the file shrank to {len(self._map)} bytes")
        flat = torch.frombuffer(self._map, dtype=torch.uint8, offset=info.start, count=info.nbytes)
        if info.start % info.torch_dtype.itemsize:
            flat = flat.clone()  # old writers do not align; `view` needs it
        return flat.view(info.torch_dtype).reshape(info.shape)
