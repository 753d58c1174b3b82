"""Which numerics each kind of layer of a model gets."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...formats import Format
from ...numerics import PRESETS, Numerics, get_numerics


@dataclass(frozen=True)
class Policy:
    """linear, experts, grouped_output: numerics by kind of layer. weigh_first: see `nn.Experts`. kernel: an order."""

    linear: Numerics = PRESETS["checkpoint"]
    experts: Numerics = PRESETS["checkpoint"]
    grouped_output: Numerics = PRESETS["checkpoint"]
    weigh_first: bool = False
    kernel: str | None = None
    sources: dict[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def uniform(cls, numerics: str | Numerics, kernel: str | None = None) -> Policy:
        """The same numerics for every kind of layer."""
        same = get_numerics(numerics)
        return cls(same, same, same, kernel=kernel)

    def numerics(self, kind: str, fmt: Format) -> Numerics:
        numerics: Numerics = getattr(self, kind)
        return numerics
