"""What the makers share: seeded tensors, quantized weights, and saving."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blockscale import reference
from blockscale.formats import get_format
from blockscale.layouts import decode_scale


class Tensors:
    """Named tensors of a model in the making, drawn from one seeded generator."""

    def __init__(self, seed: int, std: float = 0.05) -> None:
        self.found: dict[str, Tensor] = {}
        self.std = std
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, std: float | None = None) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * (self.std if std is None else std)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._generator)

    def bf16(self, name: str, *shape: int, std: float | None = None) -> None:
        self.found[name] = self.random(*shape, std=std).bfloat16()

    def norm(self, name: str, size: int) -> None:
        self.found[name] = (1 + self.random(size, std=0.1)).bfloat16()

    def fp8(self, module: str, n: int, k: int, *, block: int, scale: str, suffix: str) -> None:
        """E4M3 weight and its block scales. scale: "f32", "f32_pow2", "bf16" or "e8m0"; suffix: the scale's name."""
        self.found[f"{module}.weight"], self.found[f"{module}.{suffix}"] = quantize_fp8(self.random(n, k), block, scale)


def quantize_fp8(w: Tensor, block: int, scale: str) -> tuple[Tensor, Tensor]:
    """`w: [n, k]` -> E4M3 data and scales as `scale` says."""
    if scale in ("f32_pow2", "e8m0"):
        q = reference.quantize(w, get_format(f"fp8_{block}x{block}_ue8m0"))
        return q.data, decode_scale(q.scale) if scale == "f32_pow2" else q.scale
    fmt = get_format(f"fp8_{block}x{block}")
    q = reference.quantize(w, fmt)
    if scale == "bf16":
        q = reference.quantize(w, fmt, scale=q.scale.bfloat16())
    return q.data, q.scale


def quantize_mxfp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """`w: [n, k]` -> I8 bytes [n, k / 2], low nibble first, and E8M0 scales [n, k / 32] that clip nothing."""
    q = reference.quantize(w, get_format("mxfp4"), scale_rounding="pow2_ceil")
    return q.data.view(torch.int8), q.scale


def quantize_nvfp4(w: Tensor, global_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`w: [n, k]` -> U8 bytes, E4M3 scales [n, k / 16], F32 scalar."""
    q = reference.quantize(w, get_format("nvfp4"), global_scale=torch.tensor(global_scale))
    assert q.global_scale is not None
    return q.data, q.scale, q.global_scale


def save(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    shards: int = 1,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write shards, index, config.json and other JSON files."""
    path.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    per = math.ceil(len(names) / shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * per : (i + 1) * per]
        save_file({n: tensors[n].contiguous() for n in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config, indent=1))
    for name, value in (extra or {}).items():
        (path / name).write_text(json.dumps(value, indent=1))
    return path
