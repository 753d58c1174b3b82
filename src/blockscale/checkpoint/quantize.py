"""Make a block-scaled checkpoint of a BF16, FP16 or FP32 one.

Every decision is made from the source's headers (`plan_quantize`); then tensors stream through, a slab at a time.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from ..formats import Format, get_format
from .describe import describe, with_quantization
from .encode import Encoding, make_encoding
from .gguf import read_gguf, save_tokenizer
from .job import Job, Listener, Result
from .names import module_of
from .reader import open_checkpoint
from .report import write_report
from .scaleout import carry_out
from .shards import pack_shards
from .source import FileTensor, SourceTensor
from .stacks import find_stacks
from .steps import Copy, Quantize, Report, Step, is_matrix
from .writer import copy_file, write_json

SKIP = (
    "*embed*",
    "*wte", "*wpe",
    "*lm_head*", "head", "*.head",
    "*norm*", "*.ln_*",
    "*.gate", "*router*", "*shared_expert_gate*",
    "*weights_proj",
    "*compressor*",
    "*hc_*",
    "*.score", "score", "*classifier*",
    "*conv*",
    "*eh_proj",
    "*visual*", "*vision_*",
)  # fmt: skip
"""Modules left alone by default: embeddings, output heads, norms, routers, DeepSeek's indexer weights and compressors,
convolutions, MTP's eh_proj, vision towers. `--only` and `--skip` replace and extend the choice."""

SHARD_SIZE = 2 << 30
"""Bytes of a written shard, at most (a single larger tensor gets a shard of its own)."""

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".partial")


@dataclass(frozen=True)
class QuantizeOptions:
    """What fixes the bytes that `quantize` writes.

    format: e.g. "fp8_128x128". style, scale_dtype: see `encode.make_encoding`; None is the usual one.
    only, skip: globs over module names: only these are quantized; these too are left alone.
    nan: "error" refuses NaN and infinities, "keep" stores them as the format's NaN (FP4 has none).
    scales: "amax", or "mse" for the searched scale with the least square error.
    report: "sample", "full" or "none". shard_size: bytes.
    """

    format: str
    style: str | None = None
    scale_dtype: str | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    nan: Literal["error", "keep"] = "error"
    scales: Literal["amax", "mse"] = "amax"
    report: Report = "sample"
    shard_size: int = SHARD_SIZE


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    format: str | Format,
    *,
    workers: int = 1,
    listen: Listener = lambda event: None,
    **options: Any,
) -> Result:
    """Quantize the linear weights of a checkpoint folder into a new one.

    src: a Hugging Face folder (safetensors, sharded or not), a single safetensors file, or a GGUF file.
    dst: must not exist, or be an earlier run of the same request: unfinished ones are resumed, complete ones left.
    format: e.g. "fp8_128x128" writes `weight` and `weight_scale_inv` as DeepSeek-V3 does. workers: processes.
    listen: called with progress events. options: fields of QuantizeOptions.

    Raises CheckpointError (DestinationError, NotFiniteError …) naming file and tensor, UnknownNameError, OSError.
    """
    chosen = QuantizeOptions(get_format(format).name, **options)
    return carry_out(plan_quantize, Path(src), Path(dst), chosen, workers, listen)


def plan_quantize(src: Path, dst: Path, options: QuantizeOptions) -> Job:
    """The whole job, from headers alone. Raises CheckpointError when there is nothing to quantize."""
    encoding = make_encoding(get_format(options.format), options.style, options.scale_dtype)
    if options.nan == "keep" and encoding.format.packed:
        raise CheckpointError(
            f"--nan keep: {encoding.format} has no code for NaN, and a NaN scale would make the weight unreadable; "
            "needs an fp8 format"
        )
    if src.suffix == ".gguf":
        original: Mapping[str, Any]
        original, stored = read_gguf(src)
        groups: dict[Path, list[Step]] = {src: [_step(tensor, encoding, options, "BF16") for tensor in stored]}
    else:
        original, groups = _from_safetensors(src, encoding, options)
    steps = [step for group in groups.values() for step in group]
    if not any(isinstance(step, Quantize) for step in steps):
        why = next((f"; {s.name}: {s.left}" for s in steps if isinstance(s, Copy) and s.left), "")
        why += f"; --only {', '.join(options.only)}" if options.only else ""
        raise CheckpointError(
            f"{src}: no tensor to quantize: {len(steps)} tensors, all skipped or no float matrices{why}"
        )
    left = _left_alone(steps, options)
    config = with_quantization(original, describe(encoding.format, encoding.style.name, left))
    folder = src if src.is_dir() else None
    files = (*groups, *(small_files(folder) if folder else ()))
    return Job(
        "quantize",
        src,
        dst,
        {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()},
        files,
        pack_shards(list(groups.values()), options.shard_size),
        _finisher(src, config, options),
        strict={"nan": "error"},
    )


def _from_safetensors(
    src: Path, encoding: Encoding, options: QuantizeOptions
) -> tuple[Mapping[str, Any], dict[Path, list[Step]]]:
    """config.json, and the steps of each file."""
    checkpoint = open_checkpoint(src)
    if checkpoint.layers:
        first = checkpoint.layers[0]
        raise CheckpointError(f"{src}: {first.name} is {first.format} already; use convert, or dequantize first")
    groups: dict[Path, list[Step]] = {}
    stacks = find_stacks(checkpoint.tensors, encoding)
    for info in checkpoint.tensors.values():
        step = _step(FileTensor(info), encoding, options, None, stacks.get(info.name))
        groups.setdefault(info.file, []).append(step)
    return checkpoint.config, groups


def _step(
    source: SourceTensor, encoding: Encoding, options: QuantizeOptions, copy_dtype: str | None, stack: str | None = None
) -> Step:
    """stack: of a stack of experts, why it must be left alone, "" when it need not; None for all others."""
    if not (chosen(source, options, stack is not None) and (stack is not None or is_matrix(source))):
        return Copy(source, dtype=copy_dtype)
    if stack:
        return Copy(source, dtype=copy_dtype, left=stack)
    if encoding.format.packed and source.shape[-1] % 2:
        raise CheckpointError(f"{source.name}: {encoding.format} packs two columns a byte, got {list(source.shape)}")
    return Quantize(source, encoding, options.nan == "keep", options.scales == "mse", options.report)


def chosen(source: SourceTensor, options: QuantizeOptions, stack: bool = False) -> bool:
    """Whether the globs pick this tensor: a module's `weight` or a stack of experts, not on a skip list; `only`
    overrides the defaults."""
    module = module_of(source.name)
    if (module == source.name and not stack) or _any(module, options.skip):
        return False
    return _any(module, options.only) if options.only else not _any(module, SKIP)


def _any(module: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(module, glob) for glob in globs)


def _left_alone(steps: Sequence[Step], options: QuantizeOptions) -> list[str]:
    """Linear modules that stay as they are, for the config's skip list: what loaders would take for quantized."""
    left = [
        module_of(s.name)
        for s in steps
        if isinstance(s, Copy) and (s.left or (module_of(s.name) != s.name and is_matrix(s.source)))
    ]
    return [module for module in left if not _any(module, ("*embed*", "*wte", "*wpe", "*norm*"))]


def small_files(folder: Path) -> list[Path]:
    """Everything else in the folder that a model needs: tokenizer, generation config, code, licence."""
    skipped = ("model.safetensors.index.json", "blockscale_manifest.json")
    return sorted(
        p for p in folder.iterdir()
        if p.is_file() and not p.name.endswith(_NOT_COPIED) and p.name not in skipped and not p.name.startswith(".")
    )  # fmt: skip


def _finisher(
    src: Path, config: Mapping[str, Any], options: QuantizeOptions
) -> Callable[[Path, Sequence[Mapping[str, Any]]], None]:
    folder = src if src.is_dir() else None

    def finish(work: Path, records: Sequence[Mapping[str, Any]]) -> None:
        if src.suffix == ".gguf":
            save_tokenizer(src, work)
        for path in small_files(folder) if folder else ():
            if path.name not in ("config.json", "hf_quant_config.json"):
                copy_file(path, work / path.name)
        write_json(work / "config.json", config)
        if options.report != "none":
            write_report(work, options.format, records)

    return finish
