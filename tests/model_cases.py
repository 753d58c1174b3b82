"""Tiny checkpoints of every family, and what the naive implementation must do to the activations of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import naive_models
from makers import make_deepseek_v3, make_deepseek_v4, make_minimax_m2, make_qwen3_moe


@dataclass(frozen=True)
class ModelCase:
    """make: writes the checkpoint. options: of the maker. acts: arguments of `naive_models.model`."""

    make: Callable[..., Path]
    options: dict[str, Any] = field(default_factory=dict)
    acts: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path, **options: Any) -> Path:
        return self.make(path, **self.options, **options)


V3 = partial(naive_models.e4m3, group=128, powers=False, floor=1e-10)
V32 = partial(naive_models.e4m3, group=128, powers=True, floor=1e-4)
V41 = partial(naive_models.e4m3, group=32, powers=True, floor=1e-4)
NVFP4 = partial(naive_models.nvfp4, level=torch.tensor(6.0 / (448 * 6)))

_PLAIN = {"linear": V3, "experts": V3}
_V4 = {"linear": V32, "experts": V32, "weigh_first": True}

CASES = {
    "v3": ModelCase(make_deepseek_v3, {}, _PLAIN),
    "v3-ragged-k": ModelCase(make_deepseek_v3, {"ragged_k": True}, _PLAIN),
    "v3.2": ModelCase(make_deepseek_v3, {"v32": True}, {"linear": V32, "experts": V32}),
    "v4-fp4": ModelCase(make_deepseek_v4, {}, _V4),
    "v4-fp8": ModelCase(make_deepseek_v4, {"experts": "fp8"}, _V4),
    "v4-fp8-compressor": ModelCase(make_deepseek_v4, {"experts": "fp8", "compressor_fp8": True}, _V4),
    "v4-nvfp4": ModelCase(make_deepseek_v4, {"experts": "nvfp4"}, _V4 | {"experts": NVFP4}),
    "v4-32": ModelCase(make_deepseek_v4, {"block": 32}, _V4 | {"linear": V41, "experts": V41}),
    "qwen3-moe": ModelCase(make_qwen3_moe, {}, _PLAIN),
    "qwen3-moe-ragged": ModelCase(make_qwen3_moe, {"intermediate": 192}, _PLAIN),
    "minimax-m2": ModelCase(make_minimax_m2, {}, _PLAIN),
}

SELECTIVE = {
    "v3.2-top32": ModelCase(make_deepseek_v3, {"v32": True, "index_topk": 32}, CASES["v3.2"].acts),
    "v4-fp8-top12": ModelCase(make_deepseek_v4, {"experts": "fp8", "index_topk": 12}, _V4),
}
"""Indexers that keep more, so that one key more or less moves the logits less and more tokens are decided."""
