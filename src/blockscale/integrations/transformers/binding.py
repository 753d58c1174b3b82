"""Which stored weight belongs where in a transformers model.

The tensors in the file decide what is quantized, never a skip list. A `Slot` says: this stored matrix occupies these
rows of that module. Loading fills the slots from the file and saving reads them back (`filling`), so both follow one
table, and the names on disk (DeepSeek-V4's own ones too) survive a round trip.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...checkpoint import Checkpoint, StoredLayer
from ...checkpoint.header import DTYPES
from ...errors import CheckpointError
from ...formats import Format
from ...nn import BlockDiagonalLinear, Experts, Linear, Names, WeightModule
from ...policy import Policy
from ...tensor import BlockScaled

if TYPE_CHECKING:
    from .sharded import Sharder

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<which>gate_proj|up_proj|down_proj|w1|w2|w3)")
_STACKED = re.compile(r"(?P<experts>.*\.experts)\.(?P<which>gate_up_proj|down_proj)")
_ROLE = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_LOADING = Names("stored_data", "stored_scale", "stored_global_scale", "stored_input_scale")
"""Buffer names until the bytes are in: transformers shall find no tensor of that name and keep its hands off."""


@dataclass(frozen=True)
class Slot:
    """One stored matrix inside a module's `[E, N, K]` (or `[N, K]`), seen as `[E * N, K]`.

    layer: where it comes from. row, grid_row: its first row of data and of scales. index: its expert, if any.
    """

    layer: StoredLayer
    row: int = 0
    grid_row: int = 0
    index: int | None = None


@dataclass
class Bindings:
    """slots: for each of our modules (by path) the stored matrices in it. names: the buffer names that it ends with.

    plain: checkpoint name -> the model's name, of tensors that are no part of a block-scaled weight.
    """

    slots: dict[str, list[Slot]] = field(default_factory=dict)
    names: dict[str, Names] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        return list(self.slots)


def bind(
    model: nn.Module,
    checkpoint: Checkpoint,
    rename: Callable[[str], str],
    policy: Policy,
    sharder: Sharder | None = None,
) -> Bindings:
    """Put our modules, still empty on the meta device, where the checkpoint stores block-scaled weights.

    rename: checkpoint name -> the model's name. sharder: makes the modules of one rank of many.
    Raises CheckpointError when tensors and model do not fit.
    """
    bindings = Bindings(plain={info.name: rename(info.name) for info in checkpoint.plain})
    experts: dict[str, dict[str, dict[int, StoredLayer]]] = {}
    modules = dict(model.named_modules())
    for layer in checkpoint.layers:
        path = rename(f"{layer.name}.weight").removesuffix(".weight")
        single, stacked = _EXPERT.fullmatch(path), _STACKED.fullmatch(path)
        if single and single["experts"] in modules:
            roles = experts.setdefault(single["experts"], {})
            roles.setdefault(_ROLE[single["which"]], {})[int(single["index"])] = layer
        elif stacked and stacked["experts"] in modules:
            experts.setdefault(stacked["experts"], {})[stacked["which"].removesuffix("_proj")] = {-1: layer}
        elif path in modules:
            _bind_linear(model, path, modules[path], layer, bindings, policy, sharder)
        # else: not part of this model (multi-token prediction layers); transformers reports what is unexpected
    for path, roles in experts.items():
        _bind_experts(model, path, modules[path], roles, bindings, policy, sharder)
    return bindings


# -- one linear --------------------------------------------------------------------------------------------------


def _bind_linear(
    model: nn.Module, path: str, module: nn.Module, layer: StoredLayer, bindings: Bindings, policy: Policy,
    sharder: Sharder | None,
) -> None:  # fmt: skip
    if not isinstance(module, nn.Linear):
        raise CheckpointError(
            f"{layer.file}: {layer.name}: stored as {layer.format}, but {path} is a {type(module).__name__}, "
            "not a linear layer that can run on it"
        )
    n, k = module.out_features, module.in_features
    if layer.shape != (n, k):
        raise CheckpointError(
            f"{layer.file}: {layer.name}: stored {list(layer.shape)}, the model's {path} needs {[n, k]}"
        )
    groups = getattr(module, "n_groups", None)
    stored, diagonal = layer, BlockDiagonalLinear
    if sharder is not None:
        layer = sharder.local(stored)
        n, k = layer.shape
        if groups is not None:
            groups, diagonal = sharder.groups(stored, groups), sharder.diagonal(stored)
    if groups is None and sharder is not None:
        ours: WeightModule = sharder.linear(stored, _empty(layer, (n, k)), _meta_like(module.bias), policy, _LOADING)
    elif groups is None:
        ours = Linear(
            _empty(layer, (n, k)), _meta_like(module.bias), numerics=policy.linear,
            kernel=policy.kernel, names=_LOADING,
        )  # fmt: skip
    else:
        rows = layer.format.block[0]
        if rows is not None and (n // groups) % rows:
            raise CheckpointError(
                f"{layer.file}: {layer.name}: {groups} groups of {n // groups} rows cut through blocks of {rows} rows"
            )
        ours = diagonal(
            _empty(layer, (groups, n // groups, k)), numerics=policy.grouped_output,
            kernel=policy.kernel, names=_LOADING,
        )  # fmt: skip
    _place(model, path, ours)
    bindings.slots[path] = [Slot(layer)]
    bindings.names[path] = _names(layer)


def _names(layer: StoredLayer) -> Names:
    """Buffer names as the checkpoint calls the parts."""
    parts, usual = layer.parts, Names()

    def short(name: str | None, otherwise: str) -> str:
        return otherwise if name is None else name.removeprefix(layer.name).lstrip("._")

    return Names(
        short(parts.data, usual.data), short(parts.scale, usual.scale),
        short(parts.global_scale, usual.global_scale), short(parts.input_scale, usual.input_scale),
    )  # fmt: skip


# -- experts -----------------------------------------------------------------------------------------------------


def _bind_experts(
    model: nn.Module,
    path: str,
    module: nn.Module,
    roles: dict[str, dict[int, StoredLayer]],
    bindings: Bindings,
    policy: Policy,
    sharder: Sharder | None,
) -> None:
    count: int = module.num_experts  # type: ignore[assignment]
    every = count
    down = next(iter(roles.get("down", {}).values()), None)
    if sharder is not None and down is not None:
        roles, count, down = sharder.experts_here(roles, count)
    if -1 in roles.get("down", {}):
        for layer in (found[-1] for found in roles.values()):
            if layer.shape[0] != count:
                raise CheckpointError(f"{layer.file}: {layer.name}: {layer.shape[0]} experts, the model has {count}")
        weights = {role: _empty(found[-1], found[-1].shape) for role, found in roles.items()}
        slots = {role: [Slot(found[-1])] for role, found in roles.items()}
    else:
        for role in ("gate", "up", "down"):
            _check_experts(path, role, roles.get(role, {}), count)
        weights, slots = _stack(roles, count)
    gate_up = weights["gate_up"] if "gate_up" in weights else (weights["gate"], weights["up"])
    make = Experts if sharder is None or down is None else sharder.experts(every, down)
    ours = make(
        gate_up, weights["down"], limit=getattr(module, "limit", None), weigh_first=policy.weigh_first,
        numerics=policy.experts, kernel=policy.kernel, names=_LOADING,
    )  # fmt: skip
    _place(model, path, ours)
    for role, filled in slots.items():
        bindings.slots[f"{path}.{role}"] = filled
        bindings.names[f"{path}.{role}"] = Names()


def _stack(
    roles: dict[str, dict[int, StoredLayer]], count: int
) -> tuple[dict[str, BlockScaled], dict[str, list[Slot]]]:
    """Empty stacks for single experts and the slots in them; gate and up become one where they share whole blocks."""
    gate, up, down = roles["gate"], roles["up"], roles["down"]
    inner, k = gate[0].shape
    grid = gate[0].format.scale_shape(inner, k)[0]
    weights, slots = {"down": _empty_stack(down[0], count)}, {"down": _slots(down)}
    whole = gate[0].format.block[0] is not None and inner % gate[0].format.block_shape(inner, k)[0] == 0
    alike = _kind(gate[0]) == _kind(up[0]) and gate[0].parts.global_scale is None and gate[0].parts.input_scale is None
    if whole and alike:
        weights["gate_up"] = _empty_stack(gate[0], count, rows=2 * inner)
        pairs = [
            (Slot(gate[e], 2 * e * inner, 2 * e * grid, e), Slot(up[e], (2 * e + 1) * inner, (2 * e + 1) * grid, e))
            for e in range(count)
        ]
        slots["gate_up"] = [slot for pair in pairs for slot in pair]
    else:
        weights |= {"gate": _empty_stack(gate[0], count), "up": _empty_stack(up[0], count)}
        slots |= {"gate": _slots(gate), "up": _slots(up)}
    return weights, slots


def _slots(layers: dict[int, StoredLayer]) -> list[Slot]:
    rows, grid = layers[0].shape[0], layers[0].format.scale_shape(*layers[0].shape)[0]
    return [Slot(layers[e], e * rows, e * grid, e) for e in range(len(layers))]


def _kind(layer: StoredLayer) -> tuple[Format, str, tuple[int, ...], bool, bool]:
    parts = layer.parts
    return layer.format, layer.scale_dtype, layer.shape, parts.global_scale is None, parts.input_scale is None


def _check_experts(path: str, role: str, found: dict[int, StoredLayer], count: int) -> None:
    missing, extra = sorted(set(range(count)) - set(found)), sorted(set(found) - set(range(count)))
    if missing:
        raise CheckpointError(f"{path}: experts {missing[:4]} of {count} have no block-scaled {role} weight")
    if extra:
        raise CheckpointError(f"{path}: the file has {role} weights of experts {extra[:4]}, the model {count} experts")
    odd = next((layer for layer in found.values() if _kind(layer) != _kind(found[0])), None)
    if odd is not None:
        first = found[0]
        raise CheckpointError(
            f"{odd.file}: {odd.name}: {odd.format} {list(odd.shape)} with {odd.scale_dtype} scales, but "
            f"{first.name} is {first.format} {list(first.shape)} with {first.scale_dtype}: one stack holds one kind"
        )


# -- empty weights ----------------------------------------------------------------------------------------------


def _empty_stack(layer: StoredLayer, count: int, rows: int | None = None) -> BlockScaled:
    n, k = layer.shape
    return _empty(layer, (count, rows or n, k))


def _empty(layer: StoredLayer, shape: tuple[int, ...]) -> BlockScaled:
    """A weight on the meta device in the layer's format and storage dtypes."""
    fmt, parts, (*lead, n, k) = layer.format, layer.parts, shape
    scale_dtype = torch.float8_e8m0fnu if layer.scale_dtype == "U8" else DTYPES[layer.scale_dtype]
    data = torch.empty(*lead, *fmt.data_shape(n, k), dtype=fmt.element.dtype, device="meta")
    scale = torch.empty(*lead, *fmt.scale_shape(n, k), dtype=scale_dtype, device="meta")
    level, static = (
        torch.empty(lead, dtype=torch.float32, device="meta") if name else None
        for name in (parts.global_scale, parts.input_scale)
    )
    return BlockScaled(data, scale, fmt, shape=shape, global_scale=level, input_scale=static)


def _meta_like(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else torch.empty_like(bias, device="meta")


def _place(model: nn.Module, path: str, ours: nn.Module) -> None:
    model.set_submodule(path, ours.train(model.training))
