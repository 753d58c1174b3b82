"""Which tensors go into which output file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .steps import Step
from .writer import Spec


@dataclass(frozen=True)
class Shard:
    """One output file and the steps that fill it."""

    name: str
    steps: tuple[Step, ...]

    @property
    def specs(self) -> list[Spec]:
        return [spec for step in self.steps for spec in step.outputs]

    @property
    def nbytes_in(self) -> int:
        return sum(step.nbytes for step in self.steps)


def pack_shards(groups: Sequence[Sequence[Step]], limit: int) -> tuple[Shard, ...]:
    """Steps in order into shards of at most `limit` output bytes; a group (one source file) is never mixed."""
    packed: list[list[Step]] = []
    for group in groups:
        room = 0
        for step in group:
            size = sum(spec.nbytes for spec in step.outputs)
            if room < size or not packed:
                packed.append([])
                room = limit
            packed[-1].append(step)
            room -= size
    if len(packed) == 1:
        return (Shard("model.safetensors", tuple(packed[0])),)
    total = len(packed)
    return tuple(Shard(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(s)) for i, s in enumerate(packed, 1))
