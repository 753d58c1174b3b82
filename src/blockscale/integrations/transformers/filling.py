"""Stored bytes into modules and back, along the slots of `binding`.

Under accelerate's `offload_buffers=True` a module keeps no bytes: they wait on the CPU, mapped from the file wherever
they are as stored, in the map from which accelerate's hook brings them to the device for each call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import Checkpoint
from ...layouts import convert
from ...nn import Names, WeightModule
from ...platform import detect
from ...tensor import BlockScaled
from .binding import Slot


def fill(module: WeightModule, slots: list[Slot], names: Names, checkpoint: Checkpoint) -> None:
    """Put the stored bytes of `slots` into the module, under its final buffer names.

    A matrix that is a whole module on a CPU stays on the mapped file, without a copy.
    Raises CheckpointError for scales that cannot multiply.
    """
    ours, hook = module.quantized, _offloading(module)
    if hook is not None:
        _forget(hook, module.stored)
    if len(slots) == 1 and (hook is not None or ours.device.type == "cpu"):
        module.set_weight(_shaped(_stored(checkpoint, slots[0]), ours), names)
        return
    if hook is not None:
        ours = _empty_like(ours)
    for slot in slots:
        weight = _stored(checkpoint, slot)
        _copy(_shaped(weight, ours) if len(slots) == 1 else weight, ours, slot)
    module.set_weight(ours, names)


def _copy(weight: BlockScaled, ours: BlockScaled, slot: Slot) -> None:
    """Into the slot's rows."""
    for whole, part, row in ((ours.data, weight.data, slot.row), (ours.scale, weight.scale, slot.grid_row)):
        rows = _bytes(whole).flatten(0, -2)
        source = _bytes(part).flatten(0, -2)
        rows[row : row + len(source)].copy_(source)
    for level, value in ((ours.global_scale, weight.global_scale), (ours.input_scale, weight.input_scale)):
        if level is not None and value is not None:
            (level if slot.index is None else level[slot.index]).copy_(value)


def settle(module: WeightModule, dtype: torch.dtype) -> None:
    """After `fill`: the layout of the best kernel for the device on which the module runs, for x of this dtype."""
    hook = _offloading(module)
    if hook is None:
        module.pack(dtype)
        return
    where = detect(torch.device(hook.execution_device))
    weight = convert(module.quantized, module.plan(dtype, where, repack=True).layout)
    parts = (weight.data, weight.scale, weight.global_scale, weight.input_scale)
    hook.weights_map = dict(zip(module.stored, parts, strict=True))
    module.set_weight(weight.to("meta"))


def runs_on(module: nn.Module) -> torch.device | None:
    """The device to which accelerate's hook brings an offloaded module; None for one that holds its own bytes."""
    hook = _offloading(module)
    return None if hook is None else torch.device(hook.execution_device)


def _offloading(module: nn.Module) -> Any:
    """accelerate's hook that keeps this module's buffers away between calls, or None."""
    hook = getattr(module, "_hf_hook", None)
    hooks = (hook, *getattr(hook, "hooks", ()))
    return next((h for h in hooks if getattr(h, "offload", False) and getattr(h, "offload_buffers", False)), None)


def _forget(hook: Any, names: tuple[str, ...]) -> None:
    """Drop the empty buffers that accelerate put aside before they were filled."""
    aside = getattr(getattr(hook.weights_map, "dataset", None), "state_dict", None) or {}
    for name in names:
        aside.pop(f"{hook.weights_map.prefix}{name}", None)


@contextmanager
def _present(module: WeightModule) -> Iterator[None]:
    """The module with its bytes, offloaded or not."""
    hook = _offloading(module)
    if hook is None:
        yield
        return
    absent = module.quantized
    data, scale, level, static = (hook.weights_map[name] for name in module.stored)
    module.set_weight(replace(absent, data=data, scale=scale, global_scale=level, input_scale=static))
    try:
        yield
    finally:
        module.set_weight(absent)


def _stored(checkpoint: Checkpoint, slot: Slot) -> BlockScaled:
    weight = checkpoint.load(slot.layer.name)
    assert isinstance(weight, BlockScaled)
    return weight


def _empty_like(w: BlockScaled) -> BlockScaled:
    """An uninitialised weight on the CPU."""
    data, scale = (torch.empty_like(t, device="cpu") for t in (w.data, w.scale))
    level, static = (None if t is None else torch.empty_like(t, device="cpu") for t in (w.global_scale, w.input_scale))
    return replace(w, data=data, scale=scale, global_scale=level, input_scale=static)


def _shaped(weight: BlockScaled, like: BlockScaled) -> BlockScaled:
    """The same bytes under another leading shape: `[G * N, K]` as `[G, N, K]`.

    What the groups share, second levels and the one scale of a per-tensor format, every group gets a copy of.
    """
    if weight.shape == like.shape:
        return weight
    level, static = (
        None if given is None or wanted is None else given.reshape(-1).expand(wanted.shape).contiguous()
        for given, wanted in ((weight.global_scale, like.global_scale), (weight.input_scale, like.input_scale))
    )
    if weight.scale.numel() == like.scale.numel():
        scale = weight.scale.reshape(like.scale.shape)
    else:
        scale = weight.scale.expand(like.scale.shape).contiguous()
    data = weight.data.reshape(like.data.shape)
    return replace(weight, data=data, scale=scale, shape=like.shape, global_scale=level, input_scale=static)


def stored_tensors(module: WeightModule, slots: list[Slot]) -> Iterator[tuple[str, Tensor]]:
    """The module's data and scales as the checkpoint's tensors: (name, tensor)."""
    with _present(module):
        ours = module.row_weight()
    for slot in slots:
        layer = slot.layer
        *lead, n, k = layer.shape
        stack = math.prod(lead)
        data, scales = stack * n, stack * layer.format.scale_shape(n, k)[0]
        yield layer.parts.data, _bytes(ours.data).flatten(0, -2)[slot.row : slot.row + data]
        yield layer.parts.scale, _bytes(ours.scale).flatten(0, -2)[slot.grid_row : slot.grid_row + scales]


def as_stored(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Bytes under the dtype and shape that the file has."""
    return tensor.contiguous().cpu().view(dtype).reshape(shape)


def _bytes(t: Tensor) -> Tensor:
    """8-bit types as uint8: torch implements few operations on them."""
    return t.view(torch.uint8) if t.element_size() == 1 else t
