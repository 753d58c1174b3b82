"""Choose a kernel for a problem on a platform, and say why every other one was not chosen.

`explain` asks every kernel of the operation and keeps all its reasons; `select` turns the answers into a `Plan`.
Both are pure functions of a `Problem` and a `Platform`, so any choice can be computed on any machine.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from .errors import BlockscaleError, NoKernelError, UnknownNameError
from .formats import Format, ScaleRounding
from .numerics import PRESETS, Numerics
from .observe import logger
from .platform import Platform

OPS = (
    "linear", "grouped_linear", "masked_linear", "gathered_linear", "matmul", "quantize", "swiglu_quantize",
    "rmsnorm_quantize", "dense_linear",
)  # fmt: skip
ENTRY_POINTS = "blockscale.kernels"
OVERRIDE = "BLOCKSCALE_KERNEL"
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


_registered: list[Kernel] = []


def register(kernel: Kernel) -> Kernel:
    """Add a kernel to this process. Packages use the entry-point group `blockscale.kernels` instead.

    Raises BlockscaleError when it lacks an attribute, or its name or priority is taken for that op.
    """
    _check(kernel, kernels())
    _registered.append(kernel)
    _forget()
    return kernel


def unregister(kernel: Kernel) -> None:
    """Undo `register`."""
    _registered.remove(kernel)
    _forget()


def _forget() -> None:
    kernels.cache_clear()
    _select.cache_clear()
    for callback in on_change:
        callback()


on_change: list[Any] = []
"""Called after the set of kernels changed: whoever memoises a choice clears it here."""


@cache
def kernels() -> tuple[Kernel, ...]:
    """Every kernel: ours, those of installed packages, those registered here; best first."""
    from . import kernels as package

    found: list[Kernel] = []
    for module in pkgutil.iter_modules(package.__path__):
        for kernel in importlib.import_module(f"{package.__name__}.{module.name}").KERNELS:
            _check(kernel, found)
            found.append(kernel)
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        for kernel in entry.load():
            _check(kernel, found, where=f"entry point {entry.name} = {entry.value}")
            found.append(kernel)
    return tuple(sorted([*found, *_registered], key=lambda k: (k.op, -k.priority)))


def _check(kernel: Kernel, others: Iterator[Kernel] | list[Kernel] | tuple[Kernel, ...], where: str = "") -> None:
    at = f" ({where})" if where else ""
    missing = [a for a in ("name", "op", "layout", "priority", "m_range", "why_not", "run") if not hasattr(kernel, a)]
    if missing:
        raise BlockscaleError(f"kernel {kernel!r} lacks {', '.join(missing)}{at}")
    if kernel.op not in OPS:
        raise UnknownNameError("op", kernel.op, OPS, where=f"kernel {kernel.name}")
    for other in others:
        if other.op == kernel.op and other.name == kernel.name:
            raise BlockscaleError(f"kernel {kernel.name}: another {kernel.op} kernel has this name{at}")
        if other.op == kernel.op and other.priority == kernel.priority:
            raise BlockscaleError(
                f"kernel {kernel.name}: priority {kernel.priority} for {kernel.op} is taken by {other.name}{at}"
            )


def explain(problem: Problem, platform: Platform, *, repack: bool = True) -> list[Decision]:
    """Ask every kernel of the op, best first, and keep all reasons.

    repack: the weight may still be packed into each kernel's own layout (it is being loaded); False asks about the
    layout that the problem names.
    """
    decisions = []
    for kernel in kernels():
        if kernel.op != problem.op:
            continue
        seen, reasons = problem, []
        if kernel.layout not in (ANY_LAYOUT, problem.layout):
            if repack:
                seen = replace(problem, layout=kernel.layout)
            else:
                reasons.append(f"the weight is packed as {problem.layout!r}, it reads {kernel.layout!r}")
        reasons += kernel.why_not(seen, platform)
        notes = getattr(kernel, "notes", None)
        decisions.append(Decision(kernel, tuple(reasons), tuple(notes(seen)) if notes and not reasons else ()))
    return decisions


def select(problem: Problem, platform: Platform, *, kernel: str | None = None, repack: bool = True) -> Plan:
    """The plan for a problem: the best accepting kernel fixes the layout, its peers fill the other M.

    kernel: a kernel ("triton.block") or a family ("triton") that must do it. It is obeyed or NoKernelError says why
    it cannot; the environment variable BLOCKSCALE_KERNEL="linear=cpu.slices,…" orders the same from outside.
    Raises NoKernelError with every kernel's reasons; UnknownNameError when no kernel has the ordered name.
    """
    order = kernel or ordered(os.environ.get(OVERRIDE, "")).get(problem.op)
    return _select(problem, platform, order, repack)


@cache
def ordered(text: str) -> dict[str, str]:
    """Read BLOCKSCALE_KERNEL: `op=kernel[,op=kernel]…`."""
    orders = {}
    for part in filter(None, text.split(",")):
        op, equals, name = part.strip().partition("=")
        if not equals or not name:
            raise BlockscaleError(f"{OVERRIDE}: got {part!r}, need op=kernel, e.g. linear=reference.linear")
        if op not in OPS:
            raise UnknownNameError("op", op, OPS, where=OVERRIDE)
        orders[op] = name
    return orders


@cache
def _select(problem: Problem, platform: Platform, order: str | None, repack: bool) -> Plan:
    decisions = explain(problem, platform, repack=repack)
    if order is not None:
        named = [d for d in decisions if d.kernel.name == order or d.kernel.name.startswith(order + ".")]
        if not named:
            raise UnknownNameError(f"{problem.op} kernel", order, [d.kernel.name for d in decisions])
        decisions = named
    accepted = [d.kernel for d in decisions if d.accepted]
    for layout in dict.fromkeys(problem.layout if k.layout == ANY_LAYOUT else k.layout for k in accepted):
        spans = _spans([k for k in accepted if k.layout in (layout, ANY_LAYOUT)])
        if spans[0].m_min == 1 and spans[-1].m_max is None and _gapless(spans):
            plan = Plan(layout, spans)
            logger.info("%s on %s: %s", problem, platform, plan)
            return plan
    lines = [f"  {d.kernel.name}: {'; '.join(d.reasons) or _serves(d.kernel)}" for d in decisions]
    asked = f" (ordered: {order})" if order else ""
    raise NoKernelError("\n".join([f"no kernel{asked} for {problem}", f"on {platform}:", *lines]))


def _serves(kernel: Kernel) -> str:
    lo, hi = kernel.m_range
    return f"accepts, but serves only M {lo}..{'' if hi is None else hi}"


def _spans(candidates: list[Kernel]) -> tuple[Span, ...]:
    """Cut 1 … infinity at every kernel's bounds and give each piece to the best kernel that covers it."""
    cuts = {k.m_range[0] for k in candidates} | {k.m_range[1] + 1 for k in candidates if k.m_range[1] is not None}
    starts = sorted(cuts)
    spans: list[Span] = []
    for i, lo in enumerate(starts):
        hi = starts[i + 1] - 1 if i + 1 < len(starts) else None
        kernel = next((k for k in candidates if _covers(k, lo)), None)
        if kernel is None:
            continue
        if spans and spans[-1].kernel is kernel and spans[-1].m_max == lo - 1:
            spans[-1] = Span(spans[-1].m_min, hi, kernel)
        else:
            spans.append(Span(lo, hi, kernel))
    return tuple(spans)


def _covers(kernel: Kernel, m: int) -> bool:
    lo, hi = kernel.m_range
    return lo <= m and (hi is None or m <= hi)


def _gapless(spans: tuple[Span, ...]) -> bool:
    return all(a.m_max is not None and a.m_max + 1 == b.m_min for a, b in pairwise(spans))
