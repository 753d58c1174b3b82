"""Experts that are stored as one tensor of three dimensions, and whether they can be quantized one by one.

transformers fuses the experts of a layer: `experts.gate_up_proj [E, 2 I, H]`, `experts.down_proj [E, H, I]`. Some
models (gpt-oss, Llama 4) have the same names with the matrices transposed. Blocks of 1x32 along the wrong dimension
would be another model, and nothing in the names tells: the two shapes together do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from .encode import Encoding
from .header import TensorInfo

FLOATS = ("F32", "BF16", "F16", "F64")
_STACK = re.compile(r"(?P<experts>.*\bexperts)\.(?P<role>gate_up_proj|gate_proj|up_proj|down_proj)")


def find_stacks(tensors: Mapping[str, TensorInfo], encoding: Encoding) -> dict[str, str]:
    """Unquantized stacks of experts by name, each with the reason why it must stay so ("" when it need not)."""
    found: dict[str, str] = {}
    for name, info in tensors.items():
        if len(info.shape) != 3 or info.dtype not in FLOATS or "experts" not in name:
            continue
        match = _STACK.fullmatch(name)
        if match is None:
            found[name] = "a stack of experts with a name that is not known here"
        else:
            found[name] = _orientation(match["experts"], tensors) or _words(encoding)
    return found


def matrices(info: TensorInfo) -> Iterator[TensorInfo]:
    """Each expert of a stack as a tensor of its own; a matrix is its only one."""
    if len(info.shape) < 3:
        yield info
        return
    count, size = info.shape[0], info.nbytes // max(1, info.shape[0])
    for e in range(count):
        start = info.start + e * size
        yield replace(info, name=f"{info.name}[{e}]", shape=info.shape[1:], start=start, end=start + size)


def _orientation(experts: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The reason why the matrices of these stacks are not `[N, K]`, or ""."""
    down = tensors.get(f"{experts}.down_proj")
    up, halves = tensors.get(f"{experts}.gate_up_proj"), 2
    if up is None:
        up, halves = tensors.get(f"{experts}.up_proj"), 1
    if down is None or up is None or len(down.shape) != 3 or len(up.shape) != 3:
        return "a stack without its counterpart beside it: which dimension is K cannot be told"
    (_, n, k), (_, h, i) = up.shape, down.shape
    if (n, k) == (halves * i, h):
        return ""
    if (k, n) == (halves * h, i):
        return f"stored transposed: {list(up.shape)} and {list(down.shape)}"
    return f"{list(up.shape)} and {list(down.shape)} do not belong together"


def _words(encoding: Encoding) -> str:
    style, (rows, cols) = encoding.style.name, encoding.format.block
    if style == "gpt_oss" or (style == "modelopt" and rows is not None and (rows > 1 or cols is None)):
        return f"style {style} has no way to store {encoding.format} in a stack"
    return ""
