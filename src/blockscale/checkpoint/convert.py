"""One block-scaled checkpoint into another, or back to plain floats.

Exact where it can be: another scale dtype, another naming style, finer blocks, MXFP4 in FP8 where every tile allows
it. Where values would change, it refuses, unless asked to requantize, and then says by how much.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from ..formats import Format, get_format
from .config import MODELOPT_FILE, describe, with_quantization
from .encode import SCALE_DTYPES, Encoding, make_encoding
from .header import TensorInfo, dtype_code
from .job import Job, Listener, Result, copy_file, pack_shards
from .layersteps import Convert, Dequantize, LayerSource
from .names import style_of
from .quantize import SHARD_SIZE, small_files
from .reader import Checkpoint, StoredLayer, open_checkpoint
from .report import write_report
from .scaleout import carry_out
from .source import FileTensor
from .steps import Copy, Step
from .writer import write_json

_FLOATS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


@dataclass(frozen=True)
class ConvertOptions:
    """What fixes the bytes that `convert` writes.

    format: None keeps each layer's. style, scale_dtype: None keeps the layer's where that can say the format.
    only, skip: globs over modules to convert; the others keep format, style and scale dtype.
    requantize: quantize anew what cannot be converted exactly. report: "sample" or "full".
    """

    format: str | None = None
    style: str | None = None
    scale_dtype: str | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    requantize: bool = False
    report: Literal["sample", "full"] = "sample"
    shard_size: int = SHARD_SIZE


@dataclass(frozen=True)
class DequantizeOptions:
    """dtype: "bf16", "f16" or "f32"."""

    dtype: str = "bf16"
    shard_size: int = SHARD_SIZE


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    format: str | Format | None = None,
    *,
    workers: int = 1,
    listen: Listener = lambda event: None,
    **options: Any,
) -> Result:
    """Convert the block-scaled layers of `src` into `dst`. options: fields of ConvertOptions.

    Raises InexactError, naming the layer, when a value would change and `requantize` was not given.
    """
    name = None if format is None else get_format(format).name
    return carry_out(plan_convert, Path(src), Path(dst), ConvertOptions(name, **options), workers, listen)


def dequantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    dtype: str = "bf16",
    *,
    workers: int = 1,
    listen: Listener = lambda event: None,
    **options: Any,
) -> Result:
    """Write every block-scaled layer as a plain `weight` in `dtype`; the report says which were exact."""
    return carry_out(plan_dequantize, Path(src), Path(dst), DequantizeOptions(dtype, **options), workers, listen)


def plan_convert(src: Path, dst: Path, options: ConvertOptions) -> Job:
    """The whole job, from headers alone."""
    checkpoint = _quantized(src)
    encodings: dict[str, Encoding] = {}

    def step(source: LayerSource) -> Step:
        layer = source.layer
        asked = _picked(layer.name, options)
        encodings[layer.name] = encoding = _encoding(layer, checkpoint, options if asked else ConvertOptions())
        return Convert(source, encoding, options.requantize, options.report == "full")

    groups = _groups(checkpoint, step)
    config = _config(checkpoint, encodings)
    return _job("convert", checkpoint, dst, options, groups, config)


def plan_dequantize(src: Path, dst: Path, options: DequantizeOptions) -> Job:
    """The whole job, from headers alone."""
    if options.dtype not in _FLOATS:
        raise CheckpointError(f"dequantize: needs one of {', '.join(_FLOATS)}, got {options.dtype!r}")
    checkpoint = _quantized(src)
    groups = _groups(checkpoint, lambda source: Dequantize(source, _FLOATS[options.dtype]))
    return _job("dequantize", checkpoint, dst, options, groups, with_quantization(checkpoint.config, None))


def _quantized(src: Path) -> Checkpoint:
    checkpoint = open_checkpoint(src)
    if not checkpoint.layers:
        raise CheckpointError(f"{src}: no block-scaled layer in {len(checkpoint.tensors)} tensors; use quantize")
    return checkpoint


def _groups(checkpoint: Checkpoint, step: Callable[[LayerSource], Step]) -> list[list[Step]]:
    """Steps by source file: a layer goes with its data, whatever file its scale is in."""
    by_data = {layer.parts.data: layer for layer in checkpoint.layers}
    others = {name for layer in checkpoint.layers for name in layer.parts.all if name not in by_data}
    groups: dict[Path, list[Step]] = {}
    for info in checkpoint.tensors.values():
        if info.name in others:
            continue
        layer = by_data.get(info.name)
        new = Copy(FileTensor(info)) if layer is None else step(LayerSource(layer, _infos(layer, checkpoint)))
        groups.setdefault(info.file, []).append(new)
    return list(groups.values())


def _infos(layer: StoredLayer, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    return {name: checkpoint.tensors[name] for name in layer.parts.all}


def _picked(module: str, options: ConvertOptions) -> bool:
    if any(fnmatch.fnmatchcase(module, glob) for glob in options.skip):
        return False
    return not options.only or any(fnmatch.fnmatchcase(module, glob) for glob in options.only)


def _encoding(layer: StoredLayer, checkpoint: Checkpoint, options: ConvertOptions) -> Encoding:
    """As asked; what was not asked stays as the layer has it, where the format allows that."""
    fmt = get_format(options.format) if options.format else layer.format
    style = options.style or style_of(layer.parts, checkpoint.quantization.method).name
    scale_dtype = options.scale_dtype
    if scale_dtype is None and fmt.scale_dtype == layer.format.scale_dtype and options.style is None:
        same = next((word for word, code in SCALE_DTYPES.items() if code == layer.scale_dtype), None)
        stored = get_format(fmt.name).scale_dtypes
        scale_dtype = same if same and (layer.scale_dtype == "U8" or _code_in(layer.scale_dtype, stored)) else None
    if options.style is None and options.format and not _can_say(fmt, style):
        style = make_encoding(fmt).style.name
    return make_encoding(fmt, style, scale_dtype)


def _code_in(code: str, dtypes: Sequence[Any]) -> bool:
    return code in [dtype_code(dtype) for dtype in dtypes]


def _can_say(fmt: Format, style: str) -> bool:
    try:
        describe(fmt, style, ())
    except CheckpointError:
        return False
    return True


def _config(checkpoint: Checkpoint, encodings: Mapping[str, Encoding]) -> dict[str, Any]:
    """config.json after the conversion. Raises CheckpointError for a mixture that no dialect can describe."""
    kinds = {(e.format.name, e.style.name): e for e in encodings.values()}
    skip = checkpoint.quantization.skip
    unchanged = all(
        (e.format, e.style.name) == (layer.format, style_of(layer.parts, checkpoint.quantization.method).name)
        for layer in checkpoint.layers
        for e in (encodings[layer.name],)
    )
    if unchanged and checkpoint.quantization.method:
        return dict(checkpoint.config)
    dense = [e for e in kinds.values() if not e.format.packed]
    packed = [e for e in kinds.values() if e.format.packed]
    if len(kinds) == 1:
        only = next(iter(kinds.values()))
        expert = "fp4" if only.style.name == "deepseek_v4" and only.format.packed else None
        return with_quantization(checkpoint.config, describe(only.format, only.style.name, skip), expert_dtype=expert)
    if len(dense) == 1 and dense[0].style.name.startswith("deepseek") and len(packed) <= 2:
        said = describe(dense[0].format, dense[0].style.name, skip)
        return with_quantization(checkpoint.config, said, expert_dtype="fp4" if packed else None)
    mixture = ", ".join(f"{fmt} as {style}" for fmt, style in sorted(kinds))
    raise CheckpointError(f"{checkpoint.path}: no config can describe this mixture: {mixture}; narrow --only or --skip")


def _job(
    tool: str,
    checkpoint: Checkpoint,
    dst: Path,
    options: ConvertOptions | DequantizeOptions,
    groups: Sequence[Sequence[Step]],
    config: Mapping[str, Any],
) -> Job:
    folder = checkpoint.path if checkpoint.path.is_dir() else None
    small = small_files(folder) if folder else []

    def finish(work: Path, records: Sequence[Mapping[str, Any]]) -> None:
        for path in small:
            if path.name not in ("config.json", MODELOPT_FILE, "quantization_report.json", "quantization_report.html"):
                copy_file(path, work / path.name)
        write_json(work / "config.json", config)
        write_report(work, tool, records)

    asked = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()}
    files = (*dict.fromkeys(info.file for info in checkpoint.tensors.values()), *small)
    return Job(
        tool,
        checkpoint.path,
        dst,
        asked,
        files,
        pack_shards(groups, options.shard_size),
        finish,
        strict={"requantize": False},
    )
