"""Load block-scaled checkpoints as stored through transformers' models.

`load(path)` gives a model at once. `enable()` makes `AutoModelForCausalLM.from_pretrained(path)` do the same until
`disable()`; both leave everything that is not block-scaled to transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto

from ...checkpoint import open_checkpoint
from ...errors import CheckpointError
from ...numerics import Numerics
from ...policy import Policy
from . import measure, quantizer
from .quantizer import LOADING, BlockscaleQuantizer, Choice, StoredConfig, check_version
from .sharded import Parallel

METHODS = ("fp8", "mxfp8", "mxfp4", "modelopt", "compressed-tensors")
"""Values of `quant_method` that `load` takes."""
ENABLED = ("fp8", "mxfp8", "modelopt")
"""Those of them that `enable` takes over: the others belong to transformers' own integrations too."""

_stock: dict[str, tuple[Any, Any]] = {}

__all__ = ["Parallel", "Policy", "disable", "enable", "load", "measure"]


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    numerics: str | Numerics | Policy = "reference",
    kernel: str | None = None,
    device: torch.device | str | None = None,
    parallel: Parallel | None = None,
    **options: Any,
) -> Any:
    """A causal language model whose block-scaled layers run on the stored bytes.

    path: a checkpoint folder. dtype: of activations and unquantized weights; "auto" is the checkpoint's.
    numerics: what is computed: "reference" (as the model's authors do), "hf", "vllm", or a `Numerics` for every
    layer; see `blockscale.policy`. kernel: an order for every layer. device: where to (default CPU).
    parallel: this process is one rank of many and takes its part (`blockscale.parallel`).
    options: `from_pretrained`'s, e.g. device_map.

    Raises CheckpointError when the folder holds no block-scaled weights or contradicts itself, NoKernelError when
    nothing can run a layer, BlockscaleError for an untested transformers.
    """
    check_version()
    if device is not None:
        options["device_map"] = {"": torch.device(device)}
    checkpoint = open_checkpoint(path)
    if not checkpoint.layers:
        raise CheckpointError(f"{path}: holds no block-scaled weights; make them with `blockscale quantize`")
    config = AutoConfig.from_pretrained(path)
    if not getattr(config, "quantization_config", None):
        config.quantization_config = dict(checkpoint.quantization.raw) or {"quant_method": "fp8"}
    token = LOADING.set(Choice(numerics, kernel, parallel))
    try:
        with _installed(METHODS):
            return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **options)
    finally:
        LOADING.reset(token)


def enable(numerics: str | Numerics | Policy = "reference", *, kernel: str | None = None) -> None:
    """Let `from_pretrained` load block-scaled checkpoints through this library, with these numerics.

    Raises BlockscaleError when the installed transformers is not of the tested series.
    """
    check_version()
    quantizer.enabled = Choice(numerics, kernel)
    _install(ENABLED)


def disable() -> None:
    """Give `from_pretrained` back to transformers."""
    for method, (theirs, config) in _stock.items():
        _set(auto.AUTO_QUANTIZER_MAPPING, method, theirs)
        _set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, method, config)
    _stock.clear()
    quantizer.enabled = Choice()


def _install(methods: tuple[str, ...]) -> None:
    """`register_quantizer` refuses names that exist, so the entries are replaced, and remembered."""
    quantizers, configs = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    for method in methods:
        _stock.setdefault(method, (quantizers.get(method), configs.get(method)))
        quantizers[method], configs[method] = BlockscaleQuantizer, StoredConfig


def _set(mapping: dict[str, Any], key: str, value: Any) -> None:
    if value is None:
        mapping.pop(key, None)
    else:
        mapping[key] = value


@contextmanager
def _installed(methods: tuple[str, ...]) -> Iterator[None]:
    before = {m: (auto.AUTO_QUANTIZER_MAPPING.get(m), auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(m)) for m in methods}
    for m in methods:
        auto.AUTO_QUANTIZER_MAPPING[m], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[m] = BlockscaleQuantizer, StoredConfig
    try:
        yield
    finally:
        for m, (theirs, config) in before.items():
            _set(auto.AUTO_QUANTIZER_MAPPING, m, theirs)
            _set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, m, config)
