"""Load block-scaled checkpoints as stored through transformers' models.

`load(path)` gives a model at once. `enable()` makes `AutoModelForCausalLM.from_pretrained(path)` do the same until
`disable()`, `with enabled():` within a block; all leave everything that is not block-scaled to transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ...checkpoint import open_checkpoint
from ...errors import CheckpointError
from ...numerics import Numerics
from ...platform import detect
from ...policy import Policy
from . import measure, quantizer, takeover
from .quantizer import LOADING, Choice, check_version
from .sharded import Parallel
from .whole import check_whole, read_config

METHODS = ("fp8", "mxfp8", "mxfp4", "modelopt", "compressed-tensors")
"""Values of `quant_method` that `load` takes."""
ENABLED = ("fp8", "mxfp8", "modelopt")
"""Those of them that `enable` takes over: the others belong to transformers' own integrations too."""

__all__ = ["Parallel", "Policy", "disable", "enable", "enabled", "load", "measure"]


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

    Raises CheckpointError when the folder holds no block-scaled weights, contradicts itself or lacks tensors of the
    model that its config describes (transformers would make them up), NoKernelError when
    nothing can run a layer, BlockscaleError for an untested transformers or a device that is not there.
    """
    check_version()
    if device is not None:
        detect(device)  # a device that is not there is said before anything is read
        options["device_map"] = {"": torch.device(device)}
    checkpoint = open_checkpoint(path)
    if not checkpoint.layers:
        raise CheckpointError(f"{path}: holds no block-scaled weights; make them with `blockscale quantize`")
    config = read_config(Path(path))
    if not getattr(config, "quantization_config", None):
        config.quantization_config = dict(checkpoint.quantization.raw) or {"quant_method": "fp8"}
    with _chosen(Choice(numerics, kernel, parallel), METHODS):
        with_info = options.pop("output_loading_info", False)
        mismatches = options.pop("ignore_mismatched_sizes", False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    model, info = loaded
    check_whole(Path(path), info, mismatches=mismatches)
    return (model, info) if with_info else model


def enable(numerics: str | Numerics | Policy = "reference", *, kernel: str | None = None) -> None:
    """Let `from_pretrained` load block-scaled checkpoints through this library, with these numerics, until `disable`.

    For the whole process; `enabled` is for a block of code. A second call changes the numerics.
    Raises BlockscaleError when the installed transformers is not of the tested series.
    """
    check_version()
    if quantizer.enabled is None:
        takeover.take(ENABLED)
    quantizer.enabled = Choice(numerics, kernel)


def disable() -> None:
    """Give `from_pretrained` back to transformers."""
    if quantizer.enabled is not None:
        takeover.give_back(ENABLED)
    quantizer.enabled = None


@contextmanager
def enabled(numerics: str | Numerics | Policy = "reference", *, kernel: str | None = None) -> Iterator[None]:
    """`enable` within a `with` block; the numerics hold in this thread (or task) only.

    Another thread that loads a block-scaled checkpoint meanwhile gets this library too, with the numerics that hold
    there: `enable`'s, or "reference".
    """
    check_version()
    with _chosen(Choice(numerics, kernel), ENABLED):
        yield


@contextmanager
def _chosen(choice: Choice, methods: tuple[str, ...]) -> Iterator[None]:
    token = LOADING.set(choice)
    try:
        with takeover.taken(methods):
            yield
    finally:
        LOADING.reset(token)
