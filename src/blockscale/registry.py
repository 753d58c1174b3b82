"""Choose a kernel for a problem on a platform, and say why every other one was not chosen.

`explain` asks every kernel of the operation and keeps all its reasons; `select` turns the answers into a `Plan`.
Both are pure functions of a `Problem` and a `Platform`, so any choice can be computed on any machine.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch

from . import verdicts
from .contract import ANY_LAYOUT, OPS, Decision, Kernel, Plan, Problem, QuantizerTolerance, Span
from .errors import BlockscaleError, NoKernelError, UnknownNameError
from .observe import configure, logger
from .platform import Platform, detect

ENTRY_POINTS = "blockscale.kernels"
OVERRIDE = "BLOCKSCALE_KERNEL"

__all__ = [
    "ANY_LAYOUT", "ENTRY_POINTS", "OPS", "OVERRIDE", "Decision", "Kernel", "Plan", "Problem", "QuantizerTolerance",
    "Span", "answers_to", "broken", "covers", "explain", "kernels", "on_change", "ordered", "plan_for", "register",
    "select", "unregister",
]  # fmt: skip


_registered: list[Kernel] = []


def register(kernel: Kernel) -> Kernel:
    """Add a kernel to this process. Packages use the entry-point group `blockscale.kernels` instead.

    Raises BlockscaleError when it lacks an attribute, or its name or priority is taken for that op.
    """
    _check(kernel, kernels())
    _registered.append(kernel)
    forget()
    return kernel


def unregister(kernel: Kernel) -> None:
    """Undo `register`. Raises BlockscaleError for a kernel that did not come through it."""
    if not registered_here(kernel):
        raise BlockscaleError(f"unregister: needs a kernel that `register` took in this process, got {kernel!r}")
    _registered.remove(kernel)
    forget()


def registered_here(kernel: Kernel) -> bool:
    """Whether it came through `register`, so that only this process knows it."""
    return kernel in _registered


def forget() -> None:
    """Drop every memoised choice: the kernels changed, or what is known of them."""
    global age
    age += 1
    kernels.cache_clear()
    _select.cache_clear()
    _announce.cache_clear()
    for callback in on_change:
        callback()


age = 0
"""Grows whenever the set of kernels changes, or what is known of them: a choice of another age is made anew."""
on_change: list[Any] = []
"""Called after the set of kernels changed: whoever memoises a choice clears it here."""


@cache
def kernels() -> tuple[Kernel, ...]:
    """Every kernel: ours, those of installed packages, those registered here; best first."""
    from . import kernels as package

    broken.clear()
    found: list[Kernel] = []
    for module in pkgutil.iter_modules(package.__path__):
        for kernel in importlib.import_module(f"{package.__name__}.{module.name}").KERNELS:
            _check(kernel, found)
            found.append(kernel)
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        found += _load(entry, found)
    return tuple(sorted([*found, *_registered], key=lambda k: (k.op, -k.priority)))


broken: dict[str, str] = {}
"""Entry points without kernels here, and why. They are logged; `blockscale doctor` and `explain` list them."""


def _load(entry: metadata.EntryPoint, others: list[Kernel]) -> list[Kernel]:
    """A package's kernels; none when it cannot be imported or one of them cannot be taken: another's half-installed
    package, or two that chose the same priority, must not stop ours."""
    try:
        found: list[Kernel] = list(entry.load())
        for i, kernel in enumerate(found):
            _check(kernel, [*others, *found[:i]])
    except Exception as e:  # whatever its import raises
        broken[entry.value] = f"{type(e).__name__}: {e}"
        logger.warning("kernels of entry point %s = %s: %s", entry.name, entry.value, broken[entry.value])
        return []
    return found


def _check(kernel: Kernel, others: Sequence[Kernel]) -> None:
    missing = [a for a in ("name", "op", "layout", "priority", "m_range", "why_not", "run") if not hasattr(kernel, a)]
    if missing:
        raise BlockscaleError(f"kernel {kernel!r} lacks {', '.join(missing)}")
    if kernel.op not in OPS:
        raise UnknownNameError("op", kernel.op, OPS, where=f"kernel {kernel.name}")
    for other in others:
        if other.op == kernel.op and other.name == kernel.name:
            raise BlockscaleError(f"kernel {kernel.name}: another {kernel.op} kernel has this name")
        if other.op == kernel.op and other.priority == kernel.priority:
            raise BlockscaleError(
                f"kernel {kernel.name}: priority {kernel.priority} for {kernel.op} is taken by {other.name}"
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
        if verdict := platform.value(verdicts.feature(tested_as(kernel, problem))):
            reasons.append(f"the self-test on this device {verdict}")
        notes = getattr(kernel, "notes", None)
        decisions.append(Decision(kernel, tuple(reasons), tuple(notes(seen)) if notes and not reasons else ()))
    return decisions


def select(problem: Problem, platform: Platform, *, kernel: str | None = None, repack: bool = True) -> Plan:
    """The plan for a problem: the best accepting kernel fixes the layout, its peers fill the other M.

    kernel: a kernel ("triton.block") or a family ("triton") that must do it. It is obeyed or NoKernelError says why
    it cannot; the environment variable BLOCKSCALE_KERNEL="linear=cpu.slices,…" orders the same from outside.
    Raises NoKernelError with every kernel's reasons; UnknownNameError when no kernel has the ordered name.
    """
    if kernel:
        return _select(problem, platform, kernel, repack)
    return _select(problem, platform, ordered(os.environ.get(OVERRIDE, "")).get(problem.op), repack, OVERRIDE)


def tested_as(kernel: Kernel, problem: Problem) -> str:
    """What one self-test is about: an op, a kernel and a format."""
    return f"{kernel.op}.{kernel.name}.{problem.format or 'dense'}"


verifier: Callable[[Sequence[Kernel], Problem, torch.device], bool] | None = None
"""Says whether the kernels of a plan may be used, trying those that are new here; False once it has recorded why not.
Installed by `conformance.selftest`."""


def plan_for(problem: Problem, device: torch.device, *, kernel: str | None = None, repack: bool = True) -> Plan:
    """`select` for a device of this machine. With self-tests on, kernels that are new to it are tried first, and one
    that fails is refused with that reason like any other."""
    for _ in range(len(kernels()) + 1):
        plan = select(problem, detect(device), kernel=kernel, repack=repack)
        if verifier is None or verifier([span.kernel for span in plan.spans], problem, device):
            return plan
    raise BlockscaleError(f"self-test: verdicts for {device} are recorded but do not show; is the cache writable?")


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
def _select(problem: Problem, platform: Platform, order: str | None, repack: bool, by: str = "") -> Plan:
    """by: the variable that an order came from."""
    configure()  # raises for an unknown topic, which is not followed and shall not be overlooked
    decisions = explain(problem, platform, repack=repack)
    if order is not None:
        named = [d for d in decisions if answers_to(d.kernel, order)]
        if not named:
            raise UnknownNameError(f"{problem.op} kernel", order, [d.kernel.name for d in decisions], where=by)
        decisions = named
    accepted = [d.kernel for d in decisions if d.accepted]
    for layout in dict.fromkeys(problem.layout if k.layout == ANY_LAYOUT else k.layout for k in accepted):
        spans = _spans([k for k in accepted if k.layout in (layout, ANY_LAYOUT)])
        if spans[0].m_min == 1 and spans[-1].m_max is None and _gapless(spans):
            plan = Plan(layout, spans)
            _announce(f"{problem} on {platform}: {plan}")
            return plan
    lines = [f"  {d.kernel.name}: {'; '.join(d.reasons) or _serves(d.kernel)}" for d in decisions]
    asked = f" (ordered: {order}{f' by {by}' if by else ''})" if order else ""
    raise NoKernelError("\n".join([f"no kernel{asked} for {problem}", f"on {platform}:", *lines]))


@cache
def _announce(choice: str) -> None:
    """Once: loading and calling ask about the same layer, one with and one without another layout."""
    logger.info(choice)


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
        kernel = next((k for k in candidates if covers(k, lo)), None)
        if kernel is None:
            continue
        if spans and spans[-1].kernel is kernel and spans[-1].m_max == lo - 1:
            spans[-1] = Span(spans[-1].m_min, hi, kernel)
        else:
            spans.append(Span(lo, hi, kernel))
    return tuple(spans)


def answers_to(kernel: Kernel, name: str) -> bool:
    """Whether a name means this kernel: its own ("triton.block") or its family's ("triton")."""
    return kernel.name == name or kernel.name.startswith(name + ".")


def covers(kernel: Kernel, m: int) -> bool:
    """Whether it serves M rows."""
    lo, hi = kernel.m_range
    return lo <= m and (hi is None or m <= hi)


def _gapless(spans: tuple[Span, ...]) -> bool:
    return all(a.m_max is not None and a.m_max + 1 == b.m_min for a, b in pairwise(spans))
