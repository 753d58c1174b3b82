"""One block-scaled checkpoint into another, or back to plain floats.

Exact where it can be: another scale dtype, another naming style, finer blocks, MXFP4 in FP8 where every tile allows
it. Where values would change, it refuses, unless asked to requantize, and then says by how much.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from ..formats import Format, get_format
from .config import MODELOPT_FILE
from .describe import describe, describe_mixture, with_quantization
from .encode import SCALE_DTYPES, Encoding, make_encoding
from .header import TensorInfo, dtype_code
from .job import Job, Listener, Result
from .layersteps import Convert, Dequantize, LayerSource
from .names import style_of
from .quantize import SHARD_SIZE, small_files
from .reader import Checkpoint, StoredLayer, open_checkpoint
from .report import PAGE, REPORT, write_report
from .scaleout import carry_out
from .shards import pack_shards
from .source import FileTensor
from .steps import Copy, Step
from .writer import copy_file, write_json

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
    """Write every block-scaled layer as a plain `weight` in `dtype`; the report says which were exact.

    dtype: "bf16", "f16" or "f32". workers, listen and what is raised: as in `convert_checkpoint`.
    """
    return carry_out(plan_dequantize, Path(src), Path(dst), DequantizeOptions(dtype, **options), workers, listen)


def plan_convert(src: Path, dst: Path, options: ConvertOptions) -> Job:
    """The whole job, from headers alone."""
    checkpoint = _quantized(src)
    if not any(_picked(layer.name, options) for layer in checkpoint.layers):
        asked = "; ".join(f"--{k} {', '.join(v)}" for k, v in (("only", options.only), ("skip", options.skip)) if v)
        raise CheckpointError(f"{src}: no layer to convert: {len(checkpoint.layers)} are block-scaled, {asked}")
    encodings: dict[str, Encoding] = {}
    main = _main_style(checkpoint)

    def step(source: LayerSource) -> Step:
        layer = source.layer
        asked = _picked(layer.name, options)
        encodings[layer.name] = encoding = _encoding(layer, checkpoint, options if asked else ConvertOptions(), main)
        return Convert(source, encoding, options.requantize, options.report == "full")

    groups = _groups(checkpoint, step)
    config = _config(checkpoint, encodings)
    return _job("convert", checkpoint, dst, options, groups, config)


def plan_dequantize(src: Path, dst: Path, options: DequantizeOptions) -> Job:
    """The whole job, from headers alone."""
    if options.dtype not in _FLOATS:
        raise CheckpointError(f"dequantize: needs one of {', '.join(_FLOATS)}, got {options.dtype!r}")
    checkpoint = _quantized(src)
    if blocked := next((layer for layer in checkpoint.layers if layer.parts.blocked), None):
        raise CheckpointError(f"{src}: {blocked.name}: gpt-oss has plain experts transposed, which is not written here")
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


def _encoding(layer: StoredLayer, checkpoint: Checkpoint, options: ConvertOptions, main: str) -> Encoding:
    """As asked; what was not asked stays as the layer has it, where the format allows that.

    main: the style of a layer whose format changes, so that one dialect can describe the result.
    """
    fmt = get_format(options.format) if options.format else layer.format
    style = options.style or (main if fmt != layer.format else _style(layer, checkpoint))
    scale_dtype = options.scale_dtype
    if scale_dtype is None and fmt.scale_dtype == layer.format.scale_dtype and options.style is None:
        same = next((word for word, code in SCALE_DTYPES.items() if code == layer.scale_dtype), None)
        stored = get_format(fmt.name).scale_dtypes
        scale_dtype = same if same and (layer.scale_dtype == "U8" or _code_in(layer.scale_dtype, stored)) else None
    if options.style is None and options.format and not _can_say(fmt, style):
        style = make_encoding(fmt).style.name
    return make_encoding(fmt, style, scale_dtype)


def _style(layer: StoredLayer, checkpoint: Checkpoint) -> str:
    return style_of(layer.parts, checkpoint.quantization.method).name


def _main_style(checkpoint: Checkpoint) -> str:
    """The usual one of a checkpoint. NVFP4 has names of its own in all of them, so it is asked last."""
    one_level = [layer for layer in checkpoint.layers if not layer.format.two_level]
    return Counter(_style(layer, checkpoint) for layer in one_level or checkpoint.layers).most_common(1)[0][0]


def _code_in(code: str, dtypes: Sequence[Any]) -> bool:
    return code in [dtype_code(dtype) for dtype in dtypes]


def _can_say(fmt: Format, style: str) -> bool:
    try:
        describe(fmt, style, ())
    except CheckpointError:
        return False
    return True


def _config(checkpoint: Checkpoint, encodings: Mapping[str, Encoding]) -> dict[str, Any] | None:
    """config.json after the conversion, None when the old one still holds.

    Raises CheckpointError for a mixture that no dialect can describe.
    """
    old, skip = checkpoint.config, checkpoint.quantization.skip
    if checkpoint.quantization.method and all(
        (encodings[layer.name].format, encodings[layer.name].style.name) == (layer.format, _style(layer, checkpoint))
        for layer in checkpoint.layers
    ):
        return None
    kinds = {(e.format.name, e.style.name): e for e in encodings.values()}
    styles = {e.style.name for e in kinds.values()}
    dense = [e for e in kinds.values() if not e.format.packed]
    packed = [e for e in kinds.values() if e.format.packed]
    if len(kinds) == 1:
        only = next(iter(kinds.values()))
        return with_quantization(old, describe(only.format, only.style.name, skip))
    if len(dense) == 1 and dense[0].style.name.startswith("deepseek") and len(packed) <= 2:
        said = describe(dense[0].format, dense[0].style.name, skip)
        return with_quantization(old, said, expert_dtype="fp4" if packed else None)
    if len(styles) == 1 and not (styles & {"deepseek", "deepseek_v4"}):
        formats = {name: e.format for name, e in encodings.items()}
        return with_quantization(old, describe_mixture(formats, styles.pop(), skip))
    mixture = ", ".join(f"{fmt} as {style}" for fmt, style in sorted(kinds))
    raise CheckpointError(
        f"{checkpoint.path}: no config can describe this mixture: {mixture}; "
        "name one --style, or narrow --only or --skip"
    )


def _job(
    tool: str,
    checkpoint: Checkpoint,
    dst: Path,
    options: ConvertOptions | DequantizeOptions,
    groups: Sequence[Sequence[Step]],
    config: Mapping[str, Any] | None,
) -> Job:
    """config: None leaves all config files as they are."""
    asked = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()}
    words = (
        (options.dtype,)
        if isinstance(options, DequantizeOptions)
        else (options.format, options.style, options.scale_dtype)
    )
    title = " ".join((tool, *(word for word in words if word)))
    folder = checkpoint.path if checkpoint.path.is_dir() else None
    small = small_files(folder) if folder else []
    replaced = (REPORT, PAGE) if config is None else (REPORT, PAGE, "config.json", MODELOPT_FILE)

    def finish(work: Path, records: Sequence[Mapping[str, Any]]) -> None:
        for path in small:
            if path.name not in replaced:
                copy_file(path, work / path.name)
        if config is not None:
            write_json(work / "config.json", config)
        write_report(work, title, records)

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
