"""Write a `quantization_config`: the words that each dialect has for a format.

The counterpart of `config`, which reads them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from ..formats import Format
from .config import ALGORITHMS, KEY

_MX = ("mxfp8", "mxfp4")


def describe(fmt: Format, style: str, skip: Sequence[str]) -> dict[str, Any]:
    """The quantization_config that says: every linear is `fmt`, stored in `style`, except `skip`.

    Raises CheckpointError when the dialect has no words for the format.
    """
    if style in ("deepseek", "deepseek_v4"):
        return _describe_deepseek(fmt, skip)
    if style == "modelopt":
        return _describe_modelopt(fmt, skip)
    if style == "gpt_oss":
        if fmt.name != "mxfp4":
            raise _no_words(style, fmt, "mxfp4")
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(skip)}
    return _describe_groups(fmt, skip)


def describe_mixture(formats: Mapping[str, Format], style: str, skip: Sequence[str]) -> dict[str, Any]:
    """The same for several formats, by module. style: "modelopt" or "compressed_tensors", which list the modules.

    Raises CheckpointError when the dialect has no words for one of them.
    """
    modules: dict[str, list[str]] = {}
    for name, fmt in formats.items():
        modules.setdefault(fmt.name, []).append(name)
    described = {fmt.name: describe(fmt, style, skip) for fmt in dict.fromkeys(formats.values())}
    said = dict(next(iter(described.values())))
    if style == "modelopt":
        said.pop("group_size", None)
        keys = ("quant_algo", "group_size")
        each = {fmt: {key: found[key] for key in keys if key in found} for fmt, found in described.items()}
        layers = {name: each[fmt.name] for name, fmt in formats.items()}
        return said | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    groups = {
        f"group_{i}": found["config_groups"]["group_0"] | {"targets": modules[fmt]}
        for i, (fmt, found) in enumerate(described.items())
    }
    return said | {"format": "mixed-precision", "config_groups": groups}


def _describe_deepseek(fmt: Format, skip: Sequence[str]) -> dict[str, Any]:
    if fmt.name in ("mxfp8", "mxfp4"):
        said: dict[str, Any] = {"quant_method": fmt.name, "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
        return said | ({"modules_to_not_convert": list(skip)} if skip else {})
    rows, cols = fmt.block
    if fmt.two_level or (rows is None) != (cols is None) or fmt.element.name == "fp8fnuz":
        raise _no_words("deepseek", fmt, "fp8_RxC, fp8_tensor, mxfp8 and mxfp4")
    said = {"activation_scheme": "dynamic", "fmt": "e5m2" if fmt.element.name == "fp8e5m2" else "e4m3"}
    said |= {"quant_method": "fp8", "weight_block_size": [rows, cols] if rows else None}
    if fmt.scale_rounding != "none":
        said["scale_fmt"] = "ue8m0"
    return said | ({"modules_to_not_convert": list(skip)} if skip else {})


def _describe_modelopt(fmt: Format, skip: Sequence[str]) -> dict[str, Any]:
    algorithm = next((a for a, name in ALGORITHMS.items() if name == fmt.name), None)
    if algorithm is None:
        raise _no_words("modelopt", fmt, ", ".join(sorted(set(ALGORITHMS.values()))))
    said: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm, "kv_cache_quant_algo": None}
    if (cols := fmt.block[1]) and fmt.block[0] == 1:
        said["group_size"] = cols
    return said | {"ignore": list(skip), "producer": {"name": "blockscale"}}


def _describe_groups(fmt: Format, skip: Sequence[str]) -> dict[str, Any]:
    rows, cols = fmt.block
    weights: dict[str, Any] = {"num_bits": fmt.element.bits, "type": "float", "symmetric": True, "dynamic": False}
    inputs: dict[str, Any] | None = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    if fmt.element.name not in ("fp8", "fp4") or (fmt.scale_rounding != "none" and fmt.name not in _MX):
        raise _no_words("compressed_tensors", fmt, "fp8_RxC, fp8_row, fp8_tensor, mxfp8, mxfp4 and nvfp4")
    kind = "float-quantized"
    assert inputs is not None
    if rows is None:
        weights["strategy"], inputs["strategy"] = "tensor", "tensor"
    elif cols is None:
        weights["strategy"], inputs["strategy"] = "channel", "token"
    elif rows > 1:
        weights |= {"strategy": "block", "block_structure": [rows, cols]}
        inputs |= {"strategy": "group", "group_size": cols}
    else:
        weights |= {"strategy": "tensor_group" if fmt.two_level else "group", "group_size": cols}
        inputs |= {"strategy": "group", "group_size": cols}
        kind = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}.get(
            fmt.name, kind
        )
        if fmt.packed:
            inputs = None  # weight-only: static input scales need calibration data, which a weight file has not
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(skip),
    }


def _no_words(style: str, fmt: Format, known: str) -> CheckpointError:
    return CheckpointError(f"style {style} cannot describe {fmt}; it has words for {known}")


def with_quantization(config: Mapping[str, Any], said: Mapping[str, Any] | None, **extra: Any) -> dict[str, Any]:
    """`config` with its quantization_config replaced (None: removed) where it was, at the top otherwise."""
    new = dict(config)
    nested = new.get("text_config")
    inside = isinstance(nested, dict) and bool(nested.get(KEY)) and not new.get(KEY)
    new.pop(KEY, None)
    new.pop("expert_dtype", None)
    if isinstance(nested, dict):
        nested = {k: v for k, v in nested.items() if k not in (KEY, "expert_dtype")}
        new["text_config"] = nested | ({KEY: dict(said)} if said and inside else {})
    if said and not inside:
        new[KEY] = dict(said)
    return new | {k: v for k, v in extra.items() if v is not None}
