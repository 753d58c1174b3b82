"""Taking `quant_method`s out of transformers' tables, and giving them back.

`register_quantizer` refuses names that exist, so entries are replaced and remembered. Holders are counted: loads in
several threads, and an `enable` around them, may end in any order, and the last one puts transformers' own entry back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from transformers.quantizers import auto

from .quantizer import BlockscaleQuantizer, StoredConfig

_lock = Lock()
_holders: Counter[str] = Counter()
_stock: dict[str, tuple[Any, Any]] = {}


def take(methods: tuple[str, ...]) -> None:
    """From now on these methods are ours, until as many calls of `give_back`."""
    quantizers, configs = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    with _lock:
        for method in methods:
            if not _holders[method]:
                _stock[method] = quantizers.get(method), configs.get(method)
                quantizers[method], configs[method] = BlockscaleQuantizer, StoredConfig
            _holders[method] += 1


def give_back(methods: tuple[str, ...]) -> None:
    """Undo one `take`."""
    with _lock:
        for method in methods:
            _holders[method] -= 1
            if not _holders[method]:
                theirs, config = _stock.pop(method)
                _set(auto.AUTO_QUANTIZER_MAPPING, method, theirs)
                _set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, method, config)


@contextmanager
def taken(methods: tuple[str, ...]) -> Iterator[None]:
    take(methods)
    try:
        yield
    finally:
        give_back(methods)


def _set(mapping: dict[str, Any], key: str, value: Any) -> None:
    if value is None:
        mapping.pop(key, None)
    else:
        mapping[key] = value
