"""A transformers model of which this rank holds a part: the plan's modules instead of whole ones.

Hidden states are the same on every rank between blocks. Inside a block whose projections are cut at heads, a rank's
attention sees its own heads only: transformers' code infers their number from the tensors, but for the few attributes
that `adapt` sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import StoredLayer
from ...nn import BlockDiagonalLinear, Experts, Linear, Names, WeightModule
from ...parallel import (
    ColumnParallelDense,
    ColumnParallelLinear,
    ParallelExperts,
    RankCheckpoint,
    RowParallelLinear,
    ShardingPlan,
    World,
)
from ...parallel.cuts import shares
from ...parallel.experts import Exchange
from ...parallel.linear import BlockDiagonalPart
from ...policy import Policy
from ...tensor import BlockScaled


@dataclass(frozen=True)
class Parallel:
    """What `load(parallel=…)` takes: the ranks, how they share the model, and how experts meet their tokens."""

    world: World
    plan: ShardingPlan
    exchange: Exchange = "dispatch"


class Sharder:
    """Makes this rank's modules. `load` reads their weights (the interface of a checkpoint, as `fill` wants it)."""

    def __init__(self, parallel: Parallel) -> None:
        self.world, self.plan, self.exchange = parallel.world, parallel.plan, parallel.exchange
        self.source = RankCheckpoint(parallel.plan, parallel.world.rank)

    def load(self, name: str) -> BlockScaled:
        return self.source.load(name)

    def local(self, layer: StoredLayer) -> StoredLayer:
        """The layer in this rank's shape and format."""
        return self.source.local(layer)

    def linear(
        self, layer: StoredLayer, weight: BlockScaled, bias: Tensor | None, policy: Policy, names: Names
    ) -> WeightModule:
        """The module for one layer around this rank's (still empty) weight. bias: on the meta device."""
        split = self.plan.splits[layer.name]
        options: dict[str, Any] = {"numerics": policy.linear, "kernel": policy.kernel, "names": names}
        if split.kind == "row":
            part = self.source.piece(layer)
            assert part is not None
            return RowParallelLinear(weight, bias, group=self.world.tp, part=part, **options)
        if split.kind in ("column", "gathered"):
            if bias is not None:
                bias = torch.empty(weight.shape[0], dtype=bias.dtype, device="meta")
            return ColumnParallelLinear(
                weight, bias, group=self.world.tp, rows=split.rows, gather=split.kind == "gathered", **options
            )
        return Linear(weight, bias, **options)

    def groups(self, layer: StoredLayer, groups: int) -> int:
        """How many of a block-diagonal linear's groups are here."""
        return groups * self.local(layer).shape[0] // layer.shape[0]

    def diagonal(self, layer: StoredLayer) -> type[BlockDiagonalLinear]:
        return BlockDiagonalLinear if self.plan.splits[layer.name].kind == "replicated" else BlockDiagonalPart

    def experts_here(
        self, roles: dict[str, dict[int, StoredLayer]], count: int
    ) -> tuple[dict[str, dict[int, StoredLayer]], int, StoredLayer]:
        """The experts on this rank, numbered from 0 and in its shapes; how many; one of the stored down projections."""
        begin, end = shares(count, self.world.ep)[self.world.outer.rank]
        here: dict[str, dict[int, StoredLayer]] = {}
        for role, layers in roles.items():
            here[role] = {
                e - begin if e >= 0 else e: self.local(x) for e, x in layers.items() if e < 0 or begin <= e < end
            }
        stored = next(x for e, x in roles["down"].items() if e < 0 or begin <= e < end)
        return here, end - begin, stored

    def experts(self, count: int, down: StoredLayer) -> Callable[..., Experts]:
        """What makes the module. count: experts of all ranks. down: a stored down projection that is here."""
        part = self.source.piece(down)
        assert part is not None
        return partial(
            ParallelExperts, outer=self.world.outer, inner=self.world.inner, owners=shares(count, self.world.ep),
            part=part, exchange=self.exchange,
        )  # fmt: skip

    # -- the model around our modules --------------------------------------------------------------------------------

    def take_head(self, model: Any) -> str | None:
        """Before loading: keep transformers from reading an output projection of which this rank wants some rows.

        Returns its path in the model, or None when it is tied to the embedding or not cut.
        """
        head = model.get_output_embeddings()
        if not self.plan.plain or type(head) is not nn.Linear or model.config.get_text_config().tie_word_embeddings:
            return None
        path: str = next(name for name, module in model.named_modules() if module is head)
        model.set_submodule(path, nn.Identity())
        return path

    def adapt(self, model: Any, head: str | None) -> None:
        """After loading: attention blocks learn of their heads, the output projection of its rows.

        head: what `take_head` returned.
        """
        for module in model.modules():
            query = getattr(module, "q_b_proj", None) or getattr(module, "q_proj", None)
            if isinstance(query, ColumnParallelLinear) and not query.gather:
                self._adapt_attention(module, query)
        if self.world.size > 1:
            self._cut_head(model, head)

    def _adapt_attention(self, module: Any, query: ColumnParallelLinear) -> None:
        width = getattr(module, "qk_head_dim", None) or module.head_dim
        heads = query.out_features // width
        key = getattr(module, "k_proj", None)
        keys = key.out_features // width if key is not None else 1 if hasattr(module, "kv_proj") else heads
        module.num_heads, module.num_key_value_groups = heads, heads // keys
        if isinstance(getattr(module, "sinks", None), nn.Parameter):
            first = sum(query.widths[: self.world.rank]) // width
            module.sinks = nn.Parameter(module.sinks[first : first + heads].clone(), requires_grad=False)

    def _cut_head(self, model: Any, head: str | None) -> None:
        if head is not None:
            name, ranges = next(iter(self.plan.plain.items()))
            weight = self.source.rows(name).to(device=model.device, dtype=model.dtype)
            model.set_submodule(head, ColumnParallelDense.part(weight, None, self.world.tp, ranges))
            return
        tied = model.get_output_embeddings()
        if type(tied) is nn.Linear and tied.out_features >= self.world.size:
            ranges = shares(tied.out_features, self.world.size)
            begin, end = ranges[self.world.rank]
            bias = None if tied.bias is None else tied.bias[begin:end]
            model.set_output_embeddings(ColumnParallelDense.part(tied.weight[begin:end], bias, self.world.tp, ranges))
