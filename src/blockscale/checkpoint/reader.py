"""Open a checkpoint and say what is stored, from its headers.

`open_checkpoint` reads headers and configs only. What a weight is follows from its tensors; where the config says
otherwise, that is an error that shows both. `load` then gives the bytes as stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats import FORMATS, Format, get_format
from ..layouts import decode_scale
from ..tensor import BlockScaled
from .config import QuantConfig, read_config
from .files import ShardReader, list_tensors
from .header import TensorInfo, dtype_code
from .names import Parts, find_parts, module_of, owner_of_scale, scale_candidates

_FP8 = {"F8_E4M3": "fp8", "F8_E5M2": "fp8e5m2", "F8_E4M3FNUZ": "fp8fnuz"}
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "F8_E4M3", "U8")
_E8M0 = ("F8_E8M0", "U8")


@dataclass(frozen=True)
class StoredLayer:
    """One block-scaled weight on disk.

    name: the module, e.g. "model.layers.0.mlp.down_proj". shape: logical `(n, k)`, or `(experts, n, k)`, in elements.
    scale_dtype: as stored ("F32", "F8_E8M0", "U8" …). parts: the tensors that make it up. file: where the data is.
    nbytes: of all parts.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    scale_dtype: str
    parts: Parts
    file: Path
    nbytes: int

    @property
    def ragged(self) -> bool:
        """Whether a block is cut off at an edge."""
        rows, cols = self.shape[-2:]
        br, bc = self.format.block_shape(rows, cols)
        return rows % br != 0 or cols % bc != 0


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
    layers = list(_layers(tensors, quantization))
    return Checkpoint(path, tensors, layers, config, quantization)


def _layers(tensors: Mapping[str, TensorInfo], config: QuantConfig) -> Iterator[StoredLayer]:
    claimed: set[str] = set()
    for info in tensors.values():
        parts = find_parts(info.name, tensors) if len(info.shape) >= 2 else None
        if parts is None:
            if info.dtype in _FP8 and len(info.shape) >= 2 and info.name not in claimed:
                if _is_scale_of_something(info.name, tensors):
                    continue
                raise CheckpointError(
                    f"{info.file}: {info}: has no scale, needs {scale_candidates(info.name)} ({config})"
                )
            continue
        if info.dtype not in (*_FP8, "U8", "I8"):
            raise CheckpointError(
                f"{info.file}: {info}: is not quantized, yet {tensors[parts.scale]} is stored for it ({config})"
            )
        claimed.update(parts.all)
        yield _layer(info, parts, tensors, config)
    for name, info in tensors.items():
        owner = owner_of_scale(name)
        if owner is not None and name not in claimed:
            raise CheckpointError(f"{info.file}: {info}: a scale without its weight ({owner}.weight)")


def _is_scale_of_something(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """NVFP4's block scales are E4M3 themselves."""
    owner = owner_of_scale(name)
    return owner is not None and (f"{owner}.weight" in tensors or f"{owner}.weight_packed" in tensors)


def _layer(info: TensorInfo, parts: Parts, tensors: Mapping[str, TensorInfo], config: QuantConfig) -> StoredLayer:
    scale = tensors[parts.scale]
    module = module_of(info.name)
    packed = info.dtype in ("U8", "I8")
    *lead, rows, width = info.shape
    shape = (*lead, rows, width * 2 if packed else width)
    level = tensors[parts.global_scale] if parts.global_scale else None
    fmt = _fp4_format(info, scale, level, shape) if packed else _fp8_format(info, scale, shape, config, module)
    said = config.formats(module)
    if packed and said and fmt.name not in [f.name for f in said]:
        raise _disagree(info, scale, config, f"stored is {fmt}, the config allows {', '.join(map(str, said))}")
    nbytes = sum(tensors[name].nbytes for name in parts.all)
    return StoredLayer(module, fmt, shape, scale.dtype, parts, info.file, nbytes)


def _fp4_format(info: TensorInfo, scale: TensorInfo, level: TensorInfo | None, shape: tuple[int, ...]) -> Format:
    """MXFP4 has E8M0 scales (or their bytes) for 32 elements, NVFP4 E4M3 scales for 16 and a global scale."""
    for name, dtypes in (("mxfp4", (*_E8M0, "F32", "BF16")), ("nvfp4", ("F8_E4M3",))):
        fmt = FORMATS[name]
        if scale.dtype in dtypes:
            _check_grid(info, scale, fmt, shape)
            if fmt.two_level and level is None:
                raise CheckpointError(
                    f"{info.file}: {info}: nvfp4 needs a global scale beside {scale.name}, found none"
                )
            return fmt
    raise CheckpointError(
        f"{info.file}: {info}: packed FP4 needs a scale in F8_E8M0, U8, F32, BF16 (mxfp4), F8_E4M3 (nvfp4), got {scale}"
    )


def _fp8_format(
    info: TensorInfo, scale: TensorInfo, shape: tuple[int, ...], config: QuantConfig, module: str
) -> Format:
    """The block size that the config gives, if the scale's grid is that; never one that is guessed from shapes."""
    if scale.dtype not in _SCALES or scale.dtype == "F8_E4M3":
        raise CheckpointError(f"{info.file}: {info}: scale needs one of F32, BF16, F16, F8_E8M0, U8, got {scale}")
    element = _FP8[info.dtype]
    said = [f for f in config.formats(module) if not f.packed]
    structural = [get_format(f"{element}_tensor"), get_format(f"{element}_row")]
    if scale.dtype in _E8M0:
        structural.append(FORMATS["mxfp8"] if element == "fp8" else get_format(f"{element}_1x32"))
    for fmt in said or structural:
        if fmt.element.name == element and _grid_fits(scale, fmt, shape):
            return _with_rounding(fmt, scale, config)
    if said:
        first = next((f for f in said if f.block[0]), said[0])
        if first.element.name != element:
            raise _disagree(info, scale, config, f"data is {element}, the config allows {', '.join(map(str, said))}")
        need = list(first.scale_shape(*shape[-2:]))
        raise _disagree(info, scale, config, f"{first.name} needs scale {[*shape[:-2], *need]}")
    raise CheckpointError(
        f"{info.file}: {info}: cannot tell the block size of {scale}: {config}, and it is never guessed from shapes"
    )


def _with_rounding(fmt: Format, scale: TensorInfo, config: QuantConfig) -> Format:
    """Powers of two where the storage dtype or the config says so."""
    if fmt.scale_rounding == "none" and (scale.dtype in _E8M0 or config.scale_fmt == "ue8m0"):
        return get_format(f"{fmt.name}_ue8m0")
    return fmt


def _grid(scale: TensorInfo) -> tuple[int, ...]:
    """The scale's shape as a grid: ModelOpt stores blocks as [gr, 1, gc, 1], channels as [n], a tensor's as []."""
    shape = scale.shape
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        return shape[0], shape[2]
    if len(shape) == 1:
        return shape[0], 1
    return shape or (1, 1)


def _grid_fits(scale: TensorInfo, fmt: Format, shape: tuple[int, ...]) -> bool:
    want = fmt.scale_shape(*shape[-2:])
    grid = _grid(scale)
    if len(shape) > 2 and len(grid) == 2 and grid[0] == shape[0] and grid[1] == 1 and want == (1, 1):
        return True  # stacked experts with one scale each
    return grid == (*shape[:-2], *want)


def _check_grid(info: TensorInfo, scale: TensorInfo, fmt: Format, shape: tuple[int, ...]) -> None:
    if not _grid_fits(scale, fmt, shape):
        want = [*shape[:-2], *fmt.scale_shape(*shape[-2:])]
        raise CheckpointError(f"{scale.file}: {info}: {fmt} of {list(shape)} needs scale {want}, got {scale}")


def _disagree(info: TensorInfo, scale: TensorInfo, config: QuantConfig, why: str) -> CheckpointError:
    return CheckpointError(f"{info.file}: {info} with {scale}: {why}; config and tensors disagree ({config})")


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
    data = parts[layer.parts.data]
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
