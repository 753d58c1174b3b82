"""Open a checkpoint and load its weights.

`open_checkpoint` reads headers and configs only (`layers` tells what is stored); `load` gives the bytes as stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..layouts import decode_scale
from ..tensor import BlockScaled
from .config import QuantConfig, read_config
from .files import ShardReader, list_tensors
from .header import TensorInfo, dtype_code
from .layers import StoredLayer, find_layers

__all__ = ["Checkpoint", "Scales", "StoredLayer", "assemble", "open_checkpoint", "scales_of"]


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. tensors: every tensor by name, from the headers. layers: the block-scaled weights.

    config: `config.json` ({} when there is none). quantization: what it says. path: the folder (or file).
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    layers: list[StoredLayer]
    config: Mapping[str, Any]
    quantization: QuantConfig
    _readers: dict[Path, ShardReader] = field(default_factory=dict, repr=False)

    @cached_property
    def _by_name(self) -> dict[str, StoredLayer]:
        return {name: layer for layer in self.layers for name in (layer.name, layer.parts.data)}

    @cached_property
    def _part_of(self) -> dict[str, StoredLayer]:
        return {name: layer for layer in self.layers for name in layer.parts.all}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def plain(self) -> list[TensorInfo]:
        """Tensors that are no part of a block-scaled weight."""
        return [t for t in self.tensors.values() if t.name not in self._part_of]

    def layer(self, name: str) -> StoredLayer | None:
        """The layer of that module or data tensor, None when it is not block-scaled."""
        return self._by_name.get(name)

    def tensor(self, name: str) -> Tensor:
        """One stored tensor as it is, on the mapped file. Raises CheckpointError when there is none."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name}")
        info = self.tensors[name]
        reader = self._readers.setdefault(info.file, ShardReader(info.file))
        return reader.view(info)

    def load(self, name: str) -> BlockScaled | Tensor:
        """A layer (by module or data tensor name) as BlockScaled, anything else as the plain tensor.

        Bytes are the file's; only the global and input scales of compressed-tensors are inverted.
        Raises CheckpointError when there is no such tensor or a scale cannot multiply.
        """
        layer = self._by_name.get(name)
        if layer is None:
            return self.tensor(name)
        return assemble(layer, {part: self.tensor(part) for part in layer.parts.all}, self.quantization)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers and the config of a folder or a single safetensors file.

    Raises CheckpointError, naming file and tensor, for everything that does not fit together.
    """
    path = Path(path)
    tensors = list_tensors(path)
    config, quantization = read_config(path if path.is_dir() else path.parent)
    layers = list(find_layers(tensors, quantization))
    return Checkpoint(path, tensors, layers, config, quantization)


@dataclass(frozen=True)
class Scales:
    """The scales of a layer as they multiply: grid `[..., grid rows, grid cols]`, fp32 second level and input scale."""

    scale: Tensor
    global_scale: Tensor | None
    input_scale: Tensor | None


def scales_of(layer: StoredLayer, parts: Mapping[str, Tensor], config: QuantConfig | None = None) -> Scales:
    """Read the scale tensors of a layer: E8M0 kept as bytes, compressed-tensors' inverses turned over.

    parts: its tensors by name (the data may be absent). Raises CheckpointError for scales that cannot multiply.
    """
    names, fmt, lead = layer.parts, layer.format, layer.shape[:-2]
    scale = parts[names.scale]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    scale = scale.reshape(*lead, *fmt.scale_shape(*layer.shape[-2:]))
    _check_scale(layer, names.scale, scale, config)
    extras: list[Tensor | None] = []
    for name in (names.global_scale, names.input_scale):
        value = None if name is None else parts[name].float()
        if value is not None:
            value = value.reshape(lead if value.numel() > 1 or lead else ())
            value = 1 / value if names.inverse else value
            if not bool((value.isfinite() & (value > 0)).all()):
                raise CheckpointError(f"{layer.file}: {name}: needs finite positive values, got {value.flatten()[0]:g}")
        extras.append(value)
    return Scales(scale, extras[0], extras[1])


def assemble(layer: StoredLayer, parts: Mapping[str, Tensor], config: QuantConfig | None = None) -> BlockScaled:
    """BlockScaled from the stored tensors of a layer. Raises CheckpointError for scales that cannot multiply."""
    s = scales_of(layer, parts, config)
    data = parts[layer.parts.data].reshape(*layer.shape[:-2], *layer.format.data_shape(*layer.shape[-2:]))
    return BlockScaled(
        data, s.scale, layer.format, shape=layer.shape, global_scale=s.global_scale, input_scale=s.input_scale
    )


def _check_scale(layer: StoredLayer, name: str, scale: Tensor, config: QuantConfig | None) -> None:
    value = decode_scale(scale)
    bad = ~value.isfinite() | (value < 0)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise CheckpointError(
            f"{layer.file}: {name}: scales must be finite and not negative, got {value[bad][0]:g} at {at} "
            f"({int(bad.sum())} of {scale.numel()}; {dtype_code(scale.dtype)})"
        )
    if layer.format.scale_rounding == "none" or scale.dtype == torch.float8_e8m0fnu:
        return
    odd = (torch.frexp(value)[0] != 0.5) & (value != 0)
    if odd.any():
        at = odd.nonzero()[0].tolist()
        raise CheckpointError(
            f"{layer.file}: {name}: {layer.format} needs powers of two, got {value[odd][0]:g} at {at} "
            f"({int(odd.sum())} of {scale.numel()}); config and tensors disagree ({config})"
        )
