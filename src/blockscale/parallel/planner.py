"""Makes a sharding plan from a checkpoint's headers and config."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from ..checkpoint import Checkpoint, StoredLayer
from ..errors import ShapeError
from ..numerics import Numerics
from ..policy import Policy, model_policy
from . import families
from .cuts import Range, cut, scaled, shares
from .errors import PlanError
from .families import EXPERT, HEAD, STACKED, role_of_expert
from .piece import activation_group
from .plan import ShardingPlan, Split

_COARSE = 16
"""Elements: where a dimension has one scale, cuts keep to this."""


def plan_sharding(
    checkpoint: Checkpoint,
    tp: int,
    ep: int = 1,
    policy: Policy | None = None,
    *,
    latents: Literal["whole", "split"] = "whole",
    gather: bool = False,
) -> ShardingPlan:
    """Divide a checkpoint over `tp` ranks, its experts over `ep` groups of them.

    policy: the model's numerics, which fix the activation groups that no cut may silently change (default: the
    reference's). latents: "split" cuts the small latent projections too. gather: cut everything along N and gather;
    every number is then bit-equal to one device, at the price of more traffic (expert groups must be single ranks).

    Raises PlanError with the layer and the reason.
    """
    if tp < 1 or ep < 1 or tp % ep:
        raise PlanError(f"{checkpoint.path}: ep={ep} must divide tp={tp}: experts lie in ep groups of tp / ep ranks")
    if gather and ep != tp:
        raise PlanError(f"{checkpoint.path}: gather needs whole experts on every rank: ep={tp}, got ep={ep}")
    policy = policy or model_policy("reference", checkpoint.config)
    maker = _Maker(checkpoint, tp, ep, policy, latents == "split", gather)
    return maker.plan()


def count_experts(checkpoint: Checkpoint) -> int:
    """The most experts that a layer has; 0 for a dense model."""
    most = 0
    for name in families.canonical(checkpoint):
        name = name.removesuffix(".weight")
        if single := EXPERT.fullmatch(name):
            most = max(most, int(single["index"]) + 1)
        elif STACKED.fullmatch(name):
            most = max(most, checkpoint.tensors[name].shape[0] if name in checkpoint.tensors else 0)
    return most


class _Maker:
    """One plan in the making."""

    def __init__(self, checkpoint: Checkpoint, tp: int, ep: int, policy: Policy, latents: bool, gather: bool) -> None:
        self.checkpoint, self.tp, self.ep, self.policy = checkpoint, tp, ep, policy
        self.latents, self.gather = latents, gather
        self.splits: dict[str, Split] = {}
        on_disk = families.canonical(checkpoint)
        self.names = {disk: name for name, disk in on_disk.items()}
        self.layers: dict[str, StoredLayer] = {}
        for layer in checkpoint.layers:
            self.layers[self.names[layer.parts.data].removesuffix(".weight")] = layer

    def plan(self) -> ShardingPlan:
        blocks: dict[str, dict[str, StoredLayer]] = {}
        routed: dict[str, list[tuple[int, str, StoredLayer]]] = {}
        for name, layer in self.layers.items():
            single, stacked = EXPERT.fullmatch(name), STACKED.fullmatch(name)
            if families.is_extra(name, self.checkpoint.config) or families.is_extra(layer.name, self.checkpoint.config):
                self.splits[layer.name] = Split("unused", (), ())
            elif single:
                entry = (int(single["index"]), role_of_expert(single["role"]), layer)
                routed.setdefault(single["experts"], []).append(entry)
            elif stacked:
                routed.setdefault(stacked["experts"], []).append((-1, stacked["role"], layer))
            else:
                parent, _, last = name.rpartition(".")
                blocks.setdefault(parent, {})[last] = layer
        for experts, found in routed.items():
            self._experts(experts, found)
        for parent, found_here in blocks.items():
            self._block(parent, found_here)
        return ShardingPlan(self.checkpoint, self.tp, self.ep, self.splits, self._plain(), frozenset(self._unread()))

    # -- dense blocks ------------------------------------------------------------------------------------------

    def _block(self, parent: str, found: dict[str, StoredLayer]) -> None:
        reason = ""
        if not self.gather and ({"gate_proj", "up_proj", "down_proj"} <= found.keys() or "gate_up_proj" in found):
            if "down_proj" in found:
                return self._mlp(found)
            reason = "down_proj is not stored block-scaled"
        elif not self.gather and {"o_proj", "o_b_proj"} & found.keys():
            done = self._attention(parent, found)
            if done is True:
                return None
            reason = str(done)
        for name, layer in found.items():
            self._alone(f"{parent}.{name}", layer, reason)
        return None

    def _alone(self, name: str, layer: StoredLayer, reason: str) -> None:
        """Column and gather, or whole."""
        n, k = layer.shape[-2:]
        latent = not self.latents and any(name.endswith(f".{s}") for s in families.LATENT)
        whole = Split("replicated", (((0, n),),), ((0, k),), reason="" if latent else reason)
        if self.tp == 1 or latent or name.endswith(".o_a_proj"):  # a block-diagonal matrix has no other cut than groups
            self.splits[layer.name] = whole
            return
        try:
            ranges = cut(n, self.tp, layer.format.block[0] or _COARSE)
        except ShapeError as e:
            self.splits[layer.name] = Split("replicated", whole.rows, whole.cols, reason=f"N={e}")
            return
        self.splits[layer.name] = Split("gathered", tuple((r,) for r in ranges), ((0, k),), reason=reason)

    def _mlp(self, found: dict[str, StoredLayer]) -> None:
        down = found["down_proj"]
        ranges = self._inner_ranges(down, self.tp, self.policy.linear)
        for name, layer in found.items():
            self.splits[layer.name] = self._mlp_part(name, layer, ranges, self.policy.linear)

    def _attention(self, parent: str, found: dict[str, StoredLayer]) -> Literal[True] | str:
        shapes = {name: layer.shape for name, layer in found.items()}
        prefix = f"{parent}."
        plain = {
            name.removeprefix(prefix): info.shape
            for info in self.checkpoint.plain
            if (name := self.names[info.name]).startswith(prefix)
        }
        heads = families.attention(shapes, plain, self.checkpoint.config)
        if isinstance(heads, str):
            return heads
        spread = _spread(heads, self.tp)
        if isinstance(spread, str):
            return spread
        columns, cols = spread
        groups = families.text_config(self.checkpoint.config).get("o_groups") if "o_a_proj" in heads.columns else None
        for name, ranges in columns.items():
            layer = found[name]
            if name == "o_a_proj" and groups and any((e - b) % (layer.shape[0] // groups) for b, e in ranges):
                return "o_a_proj is cut through a group"
            rows = tuple((r,) for r in ranges)
            self.splits[layer.name] = Split("column", rows, ((0, layer.shape[1]),))
        out = found[heads.row]
        self.splits[out.name] = self._row(out, cols, self.policy.linear)
        for name, layer in found.items():
            if layer.name not in self.splits:
                self._alone(f"{parent}.{name}", layer, "")
        return True

    # -- experts -----------------------------------------------------------------------------------------------

    def _experts(self, path: str, found: list[tuple[int, str, StoredLayer]]) -> None:
        stacked = found[0][0] < 0
        count = found[0][2].shape[0] if stacked else 1 + max(index for index, _, _ in found)
        if count < self.ep:
            raise PlanError(f"{path}: {count} experts over ep={self.ep} groups: some would hold none")
        owners = shares(count, self.ep)
        numerics, inner = self.policy.experts, self.tp // self.ep
        down = next((layer for _, role, layer in found if role == "down_proj"), None)
        if down is None:
            raise PlanError(f"{path}: experts without a block-scaled down_proj cannot be spread")
        ranges = self._inner_ranges(down, inner, numerics)
        owner_of = {expert: rank for rank, (b, e) in enumerate(owners) for expert in range(b, e)}
        for index, role, layer in found:
            split = self._mlp_part(role, layer, ranges, numerics)
            owner, experts = (None, owners) if stacked else (owner_of[index], None)
            self.splits[layer.name] = Split(
                split.kind, split.rows, split.cols, split.group, owner=owner, experts=experts
            )

    def _inner_ranges(self, down: StoredLayer, ranks: int, numerics: Numerics) -> tuple[Range, ...]:
        """Cuts of the dimension between the two matrices of an MLP."""
        size, block = down.shape[-1], down.format.block[1] or 1
        if ranks == 1:
            return ((0, size),)
        group = activation_group(down.format, numerics, down.parts.input_scale is not None)
        unit = math.lcm(group or 1, block)
        try:
            return cut(size, ranks, unit if unit > 1 else _COARSE)
        except ShapeError as e:
            raise PlanError(f"{down.name}: K={e}") from e

    def _mlp_part(self, name: str, layer: StoredLayer, ranges: tuple[Range, ...], numerics: Numerics) -> Split:
        n, k = layer.shape[-2:]
        if name == "down_proj":
            return self._row(layer, ranges, numerics)
        size = ranges[-1][1]
        halves = n // size
        if n != halves * size or halves != (2 if name == "gate_up_proj" else 1):
            raise PlanError(f"{layer.name}: {n} rows do not fit down_proj's {size} columns")
        rows = tuple(tuple((half * size + b, half * size + e) for half in range(halves)) for b, e in ranges)
        return Split("column", rows, ((0, k),))

    def _row(self, layer: StoredLayer, cols: tuple[Range, ...], numerics: Numerics) -> Split:
        static = layer.parts.input_scale is not None
        act = numerics.activation_format(layer.format)
        if len(cols) > 1 and act is not None and act.two_level and not static:
            raise PlanError(
                f"{layer.name}: cannot be cut along K: its {act} activations take a global scale from the whole "
                "matrix, and no input_scale is stored"
            )
        group = activation_group(layer.format, numerics, static)
        return Split("row", (((0, layer.shape[-2]),),), cols, group)

    # -- what is not block-scaled --------------------------------------------------------------------------------

    def _plain(self) -> dict[str, tuple[Range, ...]]:
        """The output projection is the one large unquantized matrix: cut by vocabulary, logits gathered."""
        found: dict[str, tuple[Range, ...]] = {}
        for info in self.checkpoint.plain:
            if self.names[info.name] == HEAD and self.tp > 1 and len(info.shape) == 2 and info.shape[0] >= self.tp:
                found[info.name] = shares(info.shape[0], self.tp)
        return found

    def _unread(self) -> Iterator[str]:
        for info in self.checkpoint.plain:
            if any(families.is_extra(name, self.checkpoint.config) for name in (info.name, self.names[info.name])):
                yield info.name


def _spread(heads: families.Heads, ranks: int) -> tuple[dict[str, tuple[Range, ...]], tuple[Range, ...]] | str:
    """Ranges of every projection for heads over ranks, or why there are none."""
    count = heads.count
    if ranks <= count:
        things = shares(count, ranks)
        return {n: scaled(things, width) for n, width in heads.columns.items()}, scaled(things, heads.row_width)
    if "k_proj" not in heads.columns or ranks % count:
        return f"{count} heads (or groups of heads) over {ranks} ranks"
    each = ranks // count  # ranks that share a key/value head, and divide its query heads
    query, width = heads.columns["q_proj"], heads.row_width
    head = heads.columns["k_proj"]
    if query % (each * head):
        return f"{query // head} query heads of a key/value head over {each} ranks"
    columns = {
        name: tuple((r // each * size, (r // each + 1) * size) for r in range(ranks))
        for name, size in heads.columns.items()
        if name != "q_proj"
    }
    columns["q_proj"] = scaled(shares(ranks, ranks), query // each)
    return columns, scaled(shares(ranks, ranks), width // each)
