"""Compare two checkpoints: structure, bytes, and the values of each weight.

Weights are matched by module, so a BF16 model can be compared with its quantization, and two quantizations with each
other. Everything streams; no tensor is held whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .byteio import keep_freed_memory, read_bytes
from .config import KEY
from .exact import errors, values
from .header import TensorInfo
from .layersteps import LayerSource, row_ranges
from .names import v4_to_transformers, weight_of
from .reader import Checkpoint, open_checkpoint
from .source import folded

_CHUNK = 1 << 24

_NESTED = "text_config"
_QUIET = (KEY, "torch_dtype", "dtype", "transformers_version", "expert_dtype")


def compare_checkpoints(a: str | Path, b: str | Path) -> dict[str, Any]:
    """The JSON of `verify --json`.

    identical: same tensors with the same bytes, no differences in config. same_values: every weight multiplies to the
    same numbers. structure: what only one side has, or has in another shape. config: [key, value in a, value in b].
    tensors: one row for each weight or tensor on both sides: {name, a, b, equal_bytes, relative_error, max_error}.
    """
    keep_freed_memory()
    left, right = open_checkpoint(a), open_checkpoint(b)
    ours, theirs = _logical(left), _logical(right)
    structure = [f"only in {left.path}: {name}" for name in ours if name not in theirs]
    structure += [f"only in {right.path}: {name}" for name in theirs if name not in ours]
    rows = []
    for name in ours:
        if name not in theirs:
            continue
        one, two = ours[name], theirs[name]
        if one.shape != two.shape:
            structure.append(f"{name}: {list(one.shape)} against {list(two.shape)}")
        else:
            rows.append({"name": name, "a": one.kind, "b": two.kind, **_compare(one, two)})
    config = list(_config_diff(left, right))
    same_values = not structure and all(row["relative_error"] == 0 for row in rows)
    identical = same_values and not config and all(row["equal_bytes"] for row in rows)
    worst = max((row["relative_error"] for row in rows), default=0.0)
    return {
        "a": str(left.path),
        "b": str(right.path),
        "identical": identical,
        "same_values": same_values,
        "max_relative_error": worst,
        "structure": structure,
        "config": config,
        "tensors": rows,
    }


class _Logical:
    """A weight as its values, whatever it is stored as."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.layer = checkpoint.layer(name)
        self.parts: tuple[TensorInfo, ...]
        if self.layer is None:
            self.parts = (checkpoint.tensors[name],)
            self.shape, self.kind = self.parts[0].shape, self.parts[0].dtype
        else:
            self.parts = tuple(checkpoint.tensors[part] for part in self.layer.parts.all)
            self.shape, self.kind = self.layer.shape, f"{self.layer.format} {self.layer.scale_dtype}"

    def slabs(self, multiple: int) -> Iterator[Tensor]:
        """fp64 values by rows."""
        if self.layer is not None:
            source = LayerSource(self.layer, {info.name: info for info in self.parts})
            yield from (values(q) for _, _, q in source.slabs(multiple))
            return
        info = self.parts[0]
        rows, cols = (self.shape[-2], self.shape[-1]) if len(self.shape) > 1 else (1, math.prod(self.shape))
        width = cols * info.torch_dtype.itemsize
        for matrix in range(math.prod(self.shape[:-2])):
            for begin, end in row_ranges(rows, cols, multiple):
                piece = read_bytes(info, (matrix * rows + begin) * width, (matrix * rows + end) * width)
                yield piece.view(info.torch_dtype).reshape(-1, max(1, cols)).double()


def _logical(checkpoint: Checkpoint) -> dict[str, _Logical]:
    """Weights and tensors by the name that both sides would use."""
    scaled = {layer.parts.data: layer for layer in checkpoint.layers}
    parts = {name for layer in checkpoint.layers for name in layer.parts.all}
    found = {}
    for name in checkpoint.tensors:
        if name in scaled:
            stacked = scaled[name].name == name
            found[name if stacked else weight_of(scaled[name].name)] = _Logical(checkpoint, name)
        elif name not in parts:
            found[name] = _Logical(checkpoint, name)
    if "model_type" in checkpoint.config and checkpoint.config["model_type"] == "deepseek_v4":
        found = {v4_to_transformers(name): value for name, value in found.items()}
    return found


def _compare(one: _Logical, two: _Logical) -> dict[str, Any]:
    """Byte equality, and the error of `two` relative to `one`."""
    if one.kind == two.kind and len(one.parts) == len(two.parts) and all(map(_same_bytes, one.parts, two.parts)):
        return {"equal_bytes": True, "relative_error": 0.0, "max_error": 0.0}
    multiple = math.lcm(*(side.layer.format.block[0] or 1 for side in (one, two) if side.layer is not None))
    for side in (one, two):
        if side.layer is not None and side.layer.format.block[0] is None:
            multiple = max(1, side.shape[-2])
    error = power = worst = 0.0
    for x, y in zip(one.slabs(multiple), two.slabs(multiple), strict=True):
        found = errors(x, y)
        error, power, worst = error + found[0], power + found[1], max(worst, found[2])
    relative = math.sqrt(error / power) if power > 0 else (math.inf if error else 0.0)
    return {"equal_bytes": False, "relative_error": relative, "max_error": worst}


def _same_bytes(one: TensorInfo, two: TensorInfo) -> bool:
    if (one.dtype, folded(one.shape), one.nbytes) != (two.dtype, folded(two.shape), two.nbytes):
        return False
    return all(
        torch.equal(
            read_bytes(one, at, min(at + _CHUNK, one.nbytes)), read_bytes(two, at, min(at + _CHUNK, two.nbytes))
        )
        for at in range(0, one.nbytes, _CHUNK)
    )


def _config_diff(left: Checkpoint, right: Checkpoint) -> Iterator[list[Any]]:
    """[key, a, b] where the two quantization configs differ, and for the rest of config.json: its top level, and in a
    composite model's config the language model's own part key by key.
    """
    yield from _differences(KEY, left.quantization.raw, right.quantization.raw)
    yield from _differences("config", _about_the_model(left.config), _about_the_model(right.config))
    nested = [c.config.get(_NESTED) for c in (left, right)]
    yield from _differences(f"config.{_NESTED}", *(_about_the_model(n) if isinstance(n, dict) else {} for n in nested))


def _about_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says how the model is stored, and by which software."""
    return {k: v for k, v in config.items() if k not in _QUIET and not (k == _NESTED and isinstance(v, dict))}


def _differences(where: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[list[Any]]:
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            yield [f"{where}.{key}", one.get(key), two.get(key)]
