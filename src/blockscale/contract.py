"""What a problem, a kernel and a plan are: the types that the registry, the kernels and the operations share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from .errors import NoKernelError, UnknownNameError
from .formats import Format, ScaleRounding
from .numerics import PRESETS, Numerics
from .platform import Platform

OPS = (
    "linear", "grouped_linear", "masked_linear", "gathered_linear", "matmul", "quantize", "swiglu_quantize",
    "rmsnorm_quantize", "dense_linear",
)  # fmt: skip
ANY_LAYOUT = "any"


@dataclass(frozen=True)
class Problem:
    """Everything a kernel may look at when it decides; nothing else. M is absent: the Plan chooses by M.

    op: one of OPS. n, k: weight rows and columns in elements (for quantize ops k is the columns of x, n is 0).
    x_dtype, out_dtype: dtypes of the activations and the result.
    format: the weight's format; for quantize ops the result's; None for dense_linear.
    layout: how the weight is packed; for quantize ops how the result shall be.
    groups: experts of a grouped op, else 0. static: a scale for x is given, not computed.
    scale_rounding: overrides the format's rule in quantize ops.
    x_format, x_layout: how x is stored, where it comes quantized (matmul).
    w_dtype: dtype of an unquantized weight (dense_linear).
    """

    op: str
    n: int
    k: int
    x_dtype: torch.dtype
    format: Format | None
    layout: str = "row"
    out_dtype: torch.dtype = torch.bfloat16
    numerics: Numerics = PRESETS["checkpoint"]
    groups: int = 0
    static: bool = False
    scale_rounding: ScaleRounding | None = None
    x_format: Format | None = None
    x_layout: str = "row"
    w_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise UnknownNameError("op", self.op, OPS)

    @property
    def activation_format(self) -> Format | None:
        """Format that x takes before the multiplication; None leaves it as it is."""
        return self.numerics.activation_format(self.format) if self.format else None

    def __str__(self) -> str:
        experts = f"{self.groups} x " if self.groups else ""
        shape = f"[M, {self.k}] x {experts}[{self.n}, {self.k}]" if self.n else f"[M, {self.k}]"
        dtypes = f"{_short(self.x_dtype)} -> {_short(self.out_dtype)}"
        return f"{self.op} {shape} {self.format or ''} {dtypes} numerics={self.numerics} layout={self.layout}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@runtime_checkable
class Kernel(Protocol):
    """One way to compute one op. A backend is a folder under `kernels/`, or a package with an entry point."""

    name: str
    """"<backend>.<variant>", unique for each op."""
    op: str
    layout: str
    """Weight layout that it reads (`layouts.LAYOUTS`), or "any"."""
    priority: int
    """Larger is tried first."""
    m_range: tuple[int, int | None]
    """Rows of x that it serves, inclusive; None is no upper end."""

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        """Yield every reason why it cannot run the problem. Pure: no hardware, environment or imports asked."""

    run: Any
    """Compute. Its arguments depend on the op (see CONTRIBUTING.md); it never hands over to another kernel."""


class QuantizerTolerance(NamedTuple):
    """How far a kernel's own quantizer may be from the definition, declared as its `quantizer_tolerance`.

    The scale before rounding may be off by the factor `1 ± scale_error` and is at least `scale_floor`; codes may be
    `codes` neighbours away from those that the definition gives for the scale that was written.
    """

    scale_error: float
    scale_floor: float
    codes: int


class Decision(NamedTuple):
    """One kernel's answer. No reasons means that it accepts."""

    kernel: Kernel
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What an accepting kernel does besides the computation, such as copies that its library needs."""

    @property
    def accepted(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        return f"{self.kernel.name}: {'; '.join(self.reasons) or 'accepts'}"


class Span(NamedTuple):
    """Kernel for `m_min <= M <= m_max` (None: no upper end)."""

    m_min: int
    m_max: int | None
    kernel: Kernel


@dataclass(frozen=True)
class Plan:
    """What runs a problem: one packed layout and the kernels that read it, by M."""

    layout: str
    spans: tuple[Span, ...]

    def pick(self, m: int) -> Kernel:
        """The kernel for M rows. M = 0 takes the first."""
        for span in self.spans:
            if span.m_max is None or m <= span.m_max:
                return span.kernel
        raise NoKernelError(f"no kernel in this plan serves M={m}: {self}")

    def __str__(self) -> str:
        return ", ".join(f"M {lo}..{'' if hi is None else hi}: {kernel.name}" for lo, hi, kernel in self.spans)
