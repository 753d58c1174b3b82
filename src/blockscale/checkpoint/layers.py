"""Tell what each weight of a checkpoint is, from its headers.

What a weight is follows from its tensors: the dtype of the data, the dtype and the grid of the scale. The config is
asked for what headers cannot say, the block size, and where it says otherwise than the tensors, that is an error that
shows both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..formats import FORMATS, Format, get_format
from .config import QuantConfig
from .header import TensorInfo
from .names import Parts, find_parts, owner_of_scale, scale_candidates

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


def find_layers(tensors: Mapping[str, TensorInfo], config: QuantConfig) -> Iterator[StoredLayer]:
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
    if name.endswith("_scale") and name.removesuffix("_scale") in tensors:
        return True  # of stacked experts
    return owner is not None and (f"{owner}.weight" in tensors or f"{owner}.weight_packed" in tensors)


def _layer(info: TensorInfo, parts: Parts, tensors: Mapping[str, TensorInfo], config: QuantConfig) -> StoredLayer:
    scale = tensors[parts.scale]
    module = parts.module
    packed = info.dtype in ("U8", "I8")
    *lead, rows, width = _unblocked(info) if parts.blocked else info.shape
    shape = (*lead, rows, width * 2 if packed else width)
    level = tensors[parts.global_scale] if parts.global_scale else None
    fmt = _fp4_format(info, scale, level, shape) if packed else _fp8_format(info, scale, shape, config, module)
    said = config.formats(module)
    if packed and said and fmt.name not in [f.name for f in said]:
        raise _disagree(info, scale, config, f"stored is {fmt}, the config allows {', '.join(map(str, said))}")
    nbytes = sum(tensors[name].nbytes for name in parts.all)
    return StoredLayer(module, fmt, shape, scale.dtype, parts, info.file, nbytes)


def _unblocked(info: TensorInfo) -> tuple[int, ...]:
    """`[…, N, K / 32, 16]` -> `[…, N, K / 2]`, in bytes."""
    if info.dtype != "U8" or len(info.shape) < 3 or info.shape[-1] != 16:
        raise CheckpointError(f"{info.file}: {info}: needs blocks of 16 bytes in U8: […, N, K / 32, 16]")
    *lead, groups, size = info.shape
    return (*lead, groups * size)


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
