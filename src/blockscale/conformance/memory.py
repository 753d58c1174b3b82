"""Memory that notices: outputs between canaries, poisoned before they are written; inputs that must not change.

What it sees: every tensor that a kernel allocates from Python (`torch.empty` and its kin, `zeros`, `full`), on any
device, and every input. What it cannot see: memory that C++ code or a library allocates for itself, memory that a
kernel kept from an earlier call, and writes that land more than `GUARD` bytes away or inside a tensor that is not the
kernel's to write but is not an input either. Those want a tool of the vendor (compute-sanitizer, ASan).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..tensor import BlockScaled

GUARD = 4096
"""Bytes on each side. A multiple of every alignment that kernels ask for."""
_CANARY, _NAN = 0xA5, 0xFF
_ATEN = torch.ops.aten
_EMPTY = {
    _ATEN.empty.memory_format, _ATEN.empty_strided.default, _ATEN.empty_like.default,
    _ATEN.new_empty.default, _ATEN.new_empty_strided.default,
}  # fmt: skip
_FILLED = {
    _ATEN.zeros.default, _ATEN.zeros_like.default, _ATEN.new_zeros.default, _ATEN.ones.default, _ATEN.full.default,
    _ATEN.full_like.default, _ATEN.new_full.default, _ATEN.new_ones.default,
}  # fmt: skip


class Outputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, what Python code allocates lies between canaries, and what is not filled is NaN: bytes 0xFF, so
    an element that is never written shows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in _EMPTY and func not in _FILLED:
            return out
        if not isinstance(out, Tensor) or out.device.type == "meta" or not out.numel():
            return out
        size = out.untyped_storage().nbytes()
        buffer = torch.full((size + 2 * GUARD,), _CANARY, dtype=torch.uint8, device=out.device)
        body = buffer[GUARD : GUARD + size]
        body.fill_(_NAN)
        guarded = body.view(out.dtype).as_strided(out.shape, out.stride(), GUARD // out.element_size())
        if func in _FILLED:
            guarded.copy_(out)
        self._held.append((f"{str(out.dtype).removeprefix('torch.')} {list(out.shape)}", buffer))
        return guarded

    def damage(self) -> str | None:
        """What was written outside of an allocation, None if nothing was."""
        for what, buffer in self._held:
            for where, edge in (("before", buffer[:GUARD]), ("after", buffer[-GUARD:])):
                hit = edge != _CANARY
                if bool(hit.any()):
                    at = hit.nonzero().flatten()
                    first = int(at[0]) if where == "after" else GUARD - int(at[-1])
                    return f"{len(at)} bytes written {where} the end of {what}, the nearest {first} away".replace(
                        "before the end", "before the start"
                    )
        return None


class Inputs:
    """Copies of a case's operands on a device, each amid NaN bytes: what reads past one multiplies NaN."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._held: list[tuple[str, Tensor, Tensor]] = []

    def put(self, name: str, t: Tensor, stride: tuple[int, ...] | None = None, shift: int = 0) -> Tensor:
        """The values of t with these strides, `shift` elements past an aligned address."""
        stride = stride or torch.empty(t.shape, device="meta").stride()
        size = t.element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, stride, strict=True)) if t.numel() else 0
        buffer = torch.full((2 * GUARD + (span + shift) * size,), _NAN, dtype=torch.uint8)
        buffer = torch.cat([buffer, buffer.new_full((-len(buffer) % size,), _NAN)])
        view = buffer.view(_integer(size)).as_strided(t.shape, stride, GUARD // size + shift)
        view.copy_(t.contiguous().view(_integer(size)) if t.dim() else t.reshape(1).view(_integer(size))[0])
        moved = buffer.to(self._device, copy=True)
        self._held.append((name, moved, buffer))
        return moved.view(t.dtype).as_strided(t.shape, stride, GUARD // size + shift)

    def put_scaled(self, name: str, q: BlockScaled) -> BlockScaled:
        parts = ("data", "scale", "global_scale", "input_scale")
        moved: dict[str, Any] = {p: self.put(f"{name}.{p}", t) for p in parts if (t := getattr(q, p)) is not None}
        return replace(q, **moved)

    def change(self) -> tuple[str, int, str, str] | None:
        """The first input that is not what it was: (name, byte, what is there, what was there)."""
        for name, moved, before in self._held:
            after = moved.cpu()
            differs = (after != before).nonzero()
            if len(differs):
                at = int(differs[0])
                return name, at - GUARD, f"{int(after[at]):#04x}", f"{int(before[at]):#04x}"
        return None

    def storages(self, *, but: str = "") -> set[int]:
        """Addresses of the inputs' storages, those of the input `but` left out."""
        return {moved.untyped_storage().data_ptr() for name, moved, _ in self._held if name != but}


def _integer(size: int) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]


def tensors(result: Tensor | BlockScaled) -> list[Tensor]:
    """The parts of a result."""
    if isinstance(result, Tensor):
        return [result]
    return [t for t in (result.data, result.scale, result.global_scale) if t is not None]


def raw(t: Tensor) -> Tensor:
    """Bytes on the CPU, one row for each element: `[*shape, element size]`."""
    dense = t.detach().cpu().contiguous()
    return dense.reshape(-1).view(torch.uint8).reshape(*t.shape, -1) if t.numel() else dense.new_empty(0)
