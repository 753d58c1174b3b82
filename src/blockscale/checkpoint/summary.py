"""What `inspect` tells about a checkpoint, from its headers alone."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

from .reader import Checkpoint, StoredLayer


def summarize(checkpoint: Checkpoint) -> dict[str, Any]:
    """The JSON of `inspect --json`.

    bits_per_weight: stored bits of block-scaled weights, scales included, by their elements; None without any.
    formats: one entry for each (format, scale dtype). shapes: one for each distinct layer shape. plain: by dtype.
    """
    layers = checkpoint.layers
    elements = sum(math.prod(layer.shape) for layer in layers)
    scaled = sum(layer.nbytes for layer in layers)
    plain: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for info in checkpoint.plain:
        plain[info.dtype]["tensors"] += 1
        plain[info.dtype]["bytes"] += info.nbytes
    return {
        "path": str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "quantization": str(checkpoint.quantization) if checkpoint.quantization.method else None,
        "files": len({t.file for t in checkpoint.tensors.values()}),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "layers": len(layers),
        "layer_bytes": scaled,
        "bits_per_weight": 8 * scaled / elements if elements else None,
        "formats": _formats(layers),
        "shapes": _shapes(layers),
        "plain": {dtype: plain[dtype] for dtype in sorted(plain)},
    }


def _formats(layers: list[StoredLayer]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[StoredLayer]] = defaultdict(list)
    for layer in layers:
        groups[layer.format.name, layer.scale_dtype].append(layer)
    return [
        {
            "format": name,
            "scale_dtype": dtype,
            "layers": len(group),
            "ragged": sum(layer.ragged for layer in group),
            "bytes": sum(layer.nbytes for layer in group),
            "bits_per_weight": 8 * sum(g.nbytes for g in group) / max(1, sum(math.prod(g.shape) for g in group)),
        }
        for (name, dtype), group in sorted(groups.items())
    ]


def _shapes(layers: list[StoredLayer]) -> list[dict[str, Any]]:
    counts = Counter((layer.format.name, layer.scale_dtype, layer.shape, layer.ragged) for layer in layers)
    example = {(layer.format.name, layer.scale_dtype, layer.shape): layer.name for layer in reversed(layers)}
    return [
        {
            "shape": list(shape),
            "format": fmt,
            "scale_dtype": dtype,
            "ragged": ragged,
            "layers": count,
            "example": example[fmt, dtype, shape],
        }
        for (fmt, dtype, shape, ragged), count in sorted(counts.items(), key=lambda item: (item[0][0], item[0][2]))
    ]
