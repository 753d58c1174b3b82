"""What `config.json` says about quantization. `describe` writes it.

Four dialects say the same few things: DeepSeek's `quant_method: fp8` (also Qwen3, MiniMax), `compressed-tensors`,
ModelOpt (`quant_method: modelopt` or a file `hf_quant_config.json`), and `mxfp8` / `mxfp4`. A `QuantConfig` is what
they have in common. It never decides what is stored: the safetensors headers do, and the reader compares.

Sources: the configs of DeepSeek-V3, V3.1, V4-Flash, V4.1, Qwen3-FP8 and MiniMax-M2; the compressed-tensors scheme
fields; ModelOpt's `quant_algo` names.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..formats import FORMATS, Format, get_format

KEY = "quantization_config"
MODELOPT_FILE = "hf_quant_config.json"
_FP4 = ("mxfp4", "nvfp4")
ALGORITHMS = {
    "FP8": "fp8_tensor",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_row",
    "FP8_PB_WO": "fp8_128x128",
    "NVFP4": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "MXFP4": "mxfp4",
    "W4A8_MXFP4_FP8": "mxfp4",
    "MXFP8": "mxfp8",
}


@dataclass(frozen=True)
class Rule:
    """Formats (scale rounding aside) that modules matching a target are said to have."""

    targets: tuple[str, ...]
    formats: tuple[Format, ...]

    def matches(self, module: str) -> bool:
        return any(_matches(target, module) for target in self.targets)


@dataclass(frozen=True)
class QuantConfig:
    """The quantization that a config describes.

    method: "fp8", "compressed-tensors", "modelopt", "mxfp8", "mxfp4", or "" when there is none.
    where: file and key, for messages.
    block: `weight_block_size` (rows, cols) in elements, where one is given.
    scale_fmt: "ue8m0" when scales are said to be powers of two. It says nothing about their storage dtype.
    expert_dtype: "fp4", "fp8" … where given (DeepSeek-V4). skip: modules said to be left unquantized.
    rules: formats by module, first match wins. raw: the JSON as it is in the file.
    """

    method: str = ""
    where: str = ""
    block: tuple[int, int] | None = None
    scale_fmt: str | None = None
    expert_dtype: str | None = None
    skip: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)

    def formats(self, module: str) -> tuple[Format, ...]:
        """Formats that the config allows for a module; () when it says nothing about it."""
        for rule in self.rules:
            if rule.matches(module):
                return rule.formats
        return tuple(dict.fromkeys(fmt for rule in self.rules for fmt in rule.formats))

    def __str__(self) -> str:
        if not self.method:
            return "no quantization_config"
        said = {"weight_block_size": self.block and list(self.block), "scale_fmt": self.scale_fmt}
        extra = "".join(f", {key} {value}" for key, value in said.items() if value)
        return f"{self.where} says {self.method}{extra}"


def read_config(folder: Path) -> tuple[dict[str, Any], QuantConfig]:
    """`config.json` ({} when there is none) and the quantization that it or `hf_quant_config.json` describes.

    Raises CheckpointError for what is there and cannot be read.
    """
    path = folder / "config.json"
    if path.is_symlink() and not path.is_file():
        raise CheckpointError(f"{path}: a link to nothing")  # of a download that was not finished: not "no config"
    config = load_json(path) if path.is_file() else {}
    for where, holder in (("", config), ("text_config.", config.get("text_config"))):
        if isinstance(holder, dict) and holder.get(KEY):
            return config, parse_config(holder[KEY], f"{path}: {where}{KEY}", config)
    modelopt = folder / MODELOPT_FILE
    if modelopt.is_file():
        raw = load_json(modelopt).get("quantization", {})
        return config, parse_config({"quant_method": "modelopt", **raw}, f"{modelopt}: quantization", config)
    return config, QuantConfig()


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: needs a JSON object, got {type(value).__name__}")
    return value


def parse_config(raw: Any, where: str, config: Mapping[str, Any] | None = None) -> QuantConfig:
    """Read one quantization_config. config: the whole config.json, for keys that live beside it.

    Raises CheckpointError for a method or scheme that is not block-scaled floats, or a malformed value.
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: needs a JSON object, got {type(raw).__name__}")
    method = str(raw.get("quant_method", ""))
    if method.startswith("modelopt") or (not method and "quant_algo" in raw):
        method, rules = "modelopt", tuple(_modelopt_rules(raw, where))
    elif method == "compressed-tensors":
        rules = tuple(_group_rules(raw, where))
    elif method in ("fp8", "fbgemm_fp8"):
        rules = ()
    elif method in ("mxfp8", "mxfp4"):
        rules = (Rule(("*",), (FORMATS[method],)),)
    else:
        raise CheckpointError(
            f"{where}: quant_method {method!r} is not block-scaled floats; known: fp8, compressed-tensors, modelopt, "
            "mxfp8, mxfp4"
        )
    block = _block(raw.get("weight_block_size"), where)
    expert_dtype = _expert_dtype(raw, config or {})
    if method in ("fp8", "fbgemm_fp8"):
        rules = (Rule(("*",), _fp8_formats(raw, block, expert_dtype)),)
    skip = raw.get("modules_to_not_convert") or raw.get("ignored_layers") or raw.get("ignore")
    skip = skip or raw.get("exclude_modules") or []
    if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
        raise CheckpointError(f"{where}: the skip list needs strings, got {skip!r:.200}")
    scale_fmt = raw.get("scale_fmt")
    return QuantConfig(method, where, block, scale_fmt, expert_dtype, tuple(skip), rules, raw)


def _fp8_formats(raw: Mapping[str, Any], block: tuple[int, int] | None, expert_dtype: str | None) -> tuple[Format, ...]:
    """DeepSeek's dialect: one block size for FP8; FP4 experts beside it unless expert_dtype says otherwise."""
    element = "fp8e5m2" if "e5m2" in str(raw.get("fmt", "e4m3")) else "fp8"
    if block is None:
        fp8: tuple[Format, ...] = (get_format(f"{element}_tensor"), get_format(f"{element}_row"))
    else:
        fp8 = (get_format(f"{element}_{block[0]}x{block[1]}"),)
    experts = expert_dtype or "fp4"
    return (*fp8, *(FORMATS[name] for name in _FP4 if experts in ("fp4", name)))


def _expert_dtype(raw: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """V4-Flash has it at the top of config.json, V4.1 inside quantization_config or text_config."""
    nested = config.get("text_config")
    for holder in (raw, config, nested if isinstance(nested, dict) else {}):
        if isinstance(value := holder.get("expert_dtype"), str):
            return value
    return None


def _block(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
        raise CheckpointError(f"{where}: weight_block_size needs two positive integers, got {value!r:.200}")
    return value[0], value[1]


def _group_rules(raw: Mapping[str, Any], where: str) -> Iterator[Rule]:
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}: compressed-tensors needs config_groups, got {groups!r:.200}")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise CheckpointError(f"{where}: config_groups.{name} needs weights, got {group!r:.200}")
        targets = group.get("targets", ["Linear"])
        yield Rule(tuple(map(str, targets)), (_scheme(weights, f"{where}: config_groups.{name}.weights"),))


def _scheme(weights: Mapping[str, Any], where: str) -> Format:
    """compressed-tensors' quantization args -> Format, scale rounding aside."""
    kind, bits = weights.get("type"), weights.get("num_bits")
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if kind == "float" and bits == 4 and group in (16, 32):
        return FORMATS["nvfp4" if group == 16 else "mxfp4"]
    if kind == "float" and bits == 8:
        if strategy == "block" and (block := _block(weights.get("block_structure"), where)):
            return get_format(f"fp8_{block[0]}x{block[1]}")
        if strategy == "group" and group:
            return FORMATS["mxfp8"] if group == 32 else get_format(f"fp8_1x{int(group)}")
        if strategy in ("channel", "tensor"):
            return FORMATS["fp8_row" if strategy == "channel" else "fp8_tensor"]
    raise CheckpointError(
        f"{where}: {bits}-bit {kind} with strategy {strategy} and group_size {group} is not a format known here"
    )


def _modelopt_rules(raw: Mapping[str, Any], where: str) -> Iterator[Rule]:
    layers = raw.get("quantized_layers") or {}
    if not isinstance(layers, dict):
        raise CheckpointError(f"{where}: quantized_layers needs a JSON object, got {type(layers).__name__}")
    for name, layer in layers.items():
        algorithm = layer.get("quant_algo") if isinstance(layer, dict) else None
        yield Rule((name, f"{name}.*"), (_algorithm(algorithm, where),))
    algorithm = raw.get("quant_algo")
    if algorithm and algorithm != "MIXED_PRECISION":
        yield Rule(("*",), (_algorithm(algorithm, where),))


def _algorithm(name: Any, where: str) -> Format:
    if name not in ALGORITHMS:
        raise CheckpointError(f"{where}: quant_algo {name!r} is not known; known: {', '.join(ALGORITHMS)}")
    return FORMATS[ALGORITHMS[name]]


def _matches(target: str, module: str) -> bool:
    if target in ("Linear", "*") or target == module:
        return True
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return fnmatch.fnmatchcase(module, target)


def skipped(module: str, patterns: Sequence[str]) -> bool:
    """Whether a skip list names the module: exactly, by glob, as its parent, or as one of its segments."""
    return any(
        _matches(p, module) or module.startswith(p + ".") or module.endswith("." + p) or f".{p}." in module
        for p in patterns
    )
