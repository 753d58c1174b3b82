"""That a folder holds the model which its config.json describes: transformers initialises at random what it misses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from ...errors import CheckpointError

INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"
_NAMED = 3
"""Tensors that an error names; the others it counts."""


def read_config(path: Path) -> Any:
    """transformers' config of a checkpoint folder.

    Raises CheckpointError where transformers could not find the shards, or cannot read the config or knows no such
    model.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: needs a folder with config.json and safetensors files, got one file")
    if not (path / INDEX).is_file() and not (path / ONE_FILE).is_file():
        raise CheckpointError(f"{path}: needs {INDEX} or one {ONE_FILE}, by which transformers finds the tensors")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as e:  # a stranger's config may cause any
        raise CheckpointError(f"{path / 'config.json'}: transformers cannot read it: {' '.join(str(e).split())}") from e
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"{path / 'config.json'}: no causal language model: {config.model_type}")
    return config


def check_whole(path: Path, info: Mapping[str, Any], *, mismatches: bool) -> None:
    """Raise CheckpointError for tensors that the model has and the folder lacks or holds in another shape.

    info: transformers' `loading_info`. mismatches: other shapes were asked for (`ignore_mismatched_sizes`).
    """
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{path}: the model that config.json describes also needs {_some(missing)}")
    if (other := sorted(info["mismatched_keys"])) and not mismatches:
        shapes = [f"{name} {list(got)} where the model needs {list(want)}" for name, got, want in other]
        raise CheckpointError(f"{path}: config.json describes another model than the tensors: {_some(shapes)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
