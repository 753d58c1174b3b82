"""Run every accepting kernel on every case and hold it to the definition.

Each kernel runs three times on a case: on other activations of the same shape, on the case's, and on those again.

- value: element by element within a derived bound, or the definition's bytes (`compare`).
- shape: dtype, shape, layout and strides are what the op promises.
- memory: nothing outside of what it allocated was written, and all of that was (`memory`).
- input: operands keep their bytes. alias: no result shares memory with an operand or an earlier result.
- stale: the first result is not what the second call returns, nor changed by it.
- repeat: the same bytes for the same operands.

A kernel over a library whose quantizer is not bit-exact declares a `quantizer_tolerance` (`registry`). Its quantize op
is held to that instead of to bytes. One that also multiplies shows what it multiplies, by a method
`quantize_activations(problem, x, w)`: that is held to the tolerance, and the product to the bound over it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import environment, layouts, reference
from ..errors import UnknownNameError
from ..numerics import Numerics
from ..platform import Platform, detect
from ..registry import ANY_LAYOUT, OPS, Kernel, QuantizerTolerance, answers_to, covers, explain, kernels
from ..tensor import BlockScaled
from . import compare, memory
from .cases import Case, cases
from .operands import RMS_EPS, SWIGLU_LIMIT, Expected, Operands, expected, make
from .report import Failure, Report
from .tolerance import Found, beyond
from .workers import run_sharded

Result = Tensor | BlockScaled
_WEIGHT_OPS = ("linear", "grouped_linear")


class Verdict(NamedTuple):
    """failure: None if all is right. error: the worst element's error over its bound. row_error: the worst row's
    relative error (0 for quantize ops, which compare bytes)."""

    failure: Failure | None
    error: float
    row_error: float = 0.0


def run(
    device: torch.device | str = "cpu",
    *,
    kernel: str | None = None,
    ops: Iterable[str] | None = None,
    quick: bool = False,
    workers: int = 0,
    seconds: float | None = None,
    platform: Platform | None = None,
) -> Report:
    """Try every accepting kernel on `device`.

    kernel: only this kernel or family. ops: only these. quick: one small case of each kind. workers: processes that
    share the cases, 0 for this one; they see kernels of packages and entry points, not those registered by hand here.
    seconds: start no case after that; what is left is counted as untried. platform: ask kernels about this one
    instead of the device's own (stand-ins of another platform's ops; not with workers).
    Raises UnknownNameError when no kernel, or no op, has the name.
    """
    if kernel is not None and not any(answers_to(k, kernel) for k in kernels()):
        raise UnknownNameError("kernel", kernel, sorted({k.name for k in kernels()}))
    platform = platform or detect(device)
    report, began = Report(str(platform), about=environment.facts(device)), time.monotonic()
    wanted = None if ops is None else set(ops)
    for op in (wanted or set()) - set(OPS):
        raise UnknownNameError("op", op, OPS)
    chosen = [c for c in cases(quick=quick) if wanted is None or c.op in wanted]
    chosen = [c for c in chosen if candidates(c, platform, kernel)]
    if workers:
        run_sharded(report, chosen, str(device), kernel, workers, seconds)
    else:
        for case in chosen:
            if seconds is not None and time.monotonic() - began > seconds:
                report.untried += 1
                continue
            prepared = prepare(case)
            for candidate in candidates(case, platform, kernel):
                report.add(candidate.name, str(case), *examine(candidate, case, device, *prepared))
    report.seconds = time.monotonic() - began
    return report


def candidates(case: Case, platform: Platform, name: str | None = None) -> list[Kernel]:
    """Kernels that accept a case on a platform and serve its M; name: only this kernel or family.

    A case whose weight is packed tries only kernels that read that packing as it is. One whose numerics allow `int16`
    tries those that need it; the others would compute what they do in the case without.
    """
    packed = case.op in _WEIGHT_OPS and case.layout != "row"
    problem = case.problem()

    def accepting(numerics: Numerics) -> list[Kernel]:
        asked = explain(replace(problem, numerics=numerics), platform, repack=not packed)
        return [d.kernel for d in asked if d.accepted]

    allowed = accepting(problem.numerics)
    strict = accepting(replace(problem.numerics, int16=False)) if problem.numerics.int16 else []
    return [k for k in allowed if k not in strict and (name is None or answers_to(k, name)) and covers(k, case.m)]


def prepare(case: Case) -> tuple[Operands, Expected | None]:
    """Operands and, for multiplying ops, what must come out: the same for every kernel of the case."""
    operands = make(case)
    return operands, None if case.op.endswith("quantize") else expected(case, operands)


def check(
    kernel: Kernel,
    case: Case,
    device: torch.device | str = "cpu",
    operands: Operands | None = None,
    want: Expected | None = None,
) -> tuple[Failure | None, float]:
    """One kernel on one case: the failure, if any, and the worst error as a multiple of what is allowed."""
    verdict = examine(kernel, case, device, operands, want)
    return verdict.failure, verdict.error


def examine(
    kernel: Kernel,
    case: Case,
    device: torch.device | str = "cpu",
    operands: Operands | None = None,
    want: Expected | None = None,
) -> Verdict:
    """`check` with the worst row. An exception is a failure, not an end: the report goes on with the next case."""
    o = operands or make(case)
    tolerance: QuantizerTolerance | None = getattr(kernel, "quantizer_tolerance", None)
    guard, inputs = memory.Outputs(), memory.Inputs(device)

    def failed(check: str, at: list[int] | None, got: str, need: str, error: float = float("inf")) -> Verdict:
        return Verdict(Failure(kernel.name, str(case), at, got, need, check, case.op), error)

    try:
        call = _call(kernel, case, o, inputs)
        other, x = (_activations(case, o, inputs, negate) for negate in (True, False))
        with guard:
            earlier = call(other)
            kept = _bytes(earlier)
            got = call(x)
            first = _bytes(got)
            again = call(x)
            own = _own_activations(kernel, case, o, device) if tolerance else None
        if text := guard.damage():
            return failed("memory", None, text, "no write outside of its own memory")
        if change := inputs.change():
            name, byte, now, before = change
            return failed("input", [byte], f"{name} byte {now}", f"{before}, as it was")
    except Exception as e:  # whatever a kernel raises
        return failed("raised", None, f"{type(e).__name__}: {e}", "a result")
    if form := _form(got, case):
        return failed("shape", [], *form)
    if text := _shared(inputs, earlier, got, again, case):
        return failed("alias", None, text, "memory of its own")
    if not _equal(_bytes(earlier), kept):
        return failed("stale", None, "an earlier result changed by a later call", "memory of its own")
    on_cpu = got.to("cpu")
    row = 0.0
    found: Found
    if isinstance(on_cpu, BlockScaled):
        found = _quantized(on_cpu, case, o, tolerance)
    else:
        found = (None, "", "", 0.0)
        if own is not None:
            assert tolerance is not None
            found = beyond(tolerance, own, o.x, own.format, None, case.policy.act_floor)
            want = expected(case, o, reference.dequantize(own))
        if found[0] is None:
            want = want or expected(case, o)
            found = compare.product(on_cpu, case, want, float(getattr(kernel, "accumulation_error", 0.0)))
            row = compare.row_error(on_cpu, want)
    coordinate, got_text, want_text, error = found
    if coordinate is not None:
        return failed("value", coordinate, got_text, want_text, error)
    if not _equal(_bytes(again), first):
        part, at = next((i, (a != b).nonzero()[0].tolist()) for i, (a, b) in _differing(_bytes(again), first))
        have, need = (b[part][tuple(at)].item() for b in (_bytes(again), first))
        return failed("repeat", at, f"byte {have:#04x} the second time", f"{need:#04x}, as the first time")
    return Verdict(None, error, row)


# -- the call ------------------------------------------------------------------------------------------------------


def _activations(case: Case, o: Operands, inputs: memory.Inputs, negate: bool) -> Any:
    """x on the device, lying as the case says; negated it is what an earlier call saw."""
    x, name = (-o.x, "earlier x") if negate else (o.x, "x")
    if case.op == "matmul":
        x_format = case.problem().x_format
        assert x_format is not None
        assert o.w is not None
        q = reference.quantize_activations(x, x_format, o.w, case.policy)
        return inputs.put_scaled(name, layouts.convert(q, case.layout))
    rows, cols = x.shape
    stride = {"strided": (2 * cols, 1), "transposed": (1, rows)}.get(case.edge, (cols, 1))
    return inputs.put(name, x, stride, shift=1 if case.edge == "offset" else 0)


def _call(kernel: Kernel, case: Case, o: Operands, inputs: memory.Inputs) -> Callable[[Any], Result]:
    """The kernel with everything but x bound."""
    problem, run = case.problem(), kernel.run
    if case.op == "quantize":
        scale = None if o.scale is None else inputs.put("scale", o.scale)
        return lambda x: run(problem, x, scale, o.floor)
    if case.op in ("swiglu_quantize", "rmsnorm_quantize", "dense_linear"):
        dense = None if o.dense is None else inputs.put("dense", o.dense)
        bias = None if o.bias is None else inputs.put("bias", o.bias)
        return {
            "swiglu_quantize": lambda x: run(problem, x, None if dense is None else SWIGLU_LIMIT, dense, o.floor),
            "rmsnorm_quantize": lambda x: run(problem, x, dense, RMS_EPS, o.floor),
            "dense_linear": lambda x: run(problem, x, dense, bias),
        }[case.op]
    assert o.w is not None
    layout = case.layout if case.op in _WEIGHT_OPS and kernel.layout == ANY_LAYOUT else kernel.layout
    w = inputs.put_scaled("w", layouts.convert(o.w, "row" if layout == ANY_LAYOUT else layout))
    if case.op == "matmul":
        return lambda x: run(problem, x, w)
    if case.groups:
        assert o.where is not None
        where, lead = inputs.put("where", o.where), (case.groups,) if case.op == "masked_linear" else ()
        return lambda x: run(problem, x.view(*lead, -1, case.k), w, where).view(-1, case.n)
    bias = None if o.bias is None else inputs.put("bias", o.bias)
    return lambda x: run(problem, x, w, bias)


def _own_activations(kernel: Kernel, case: Case, o: Operands, device: torch.device | str) -> BlockScaled | None:
    """What a kernel with a quantizer of its own multiplies; None where it takes x as it comes."""
    own = getattr(kernel, "quantize_activations", None)
    if own is None or o.w is None:
        return None
    q: BlockScaled = own(case.problem(), o.x.to(device), o.w.to(device))
    return q.to("cpu")


# -- what came out -------------------------------------------------------------------------------------------------


def _quantized(got: BlockScaled, case: Case, o: Operands, tolerance: QuantizerTolerance | None) -> Found:
    if case.op != "quantize":
        return compare.fused(got, case, o)
    if tolerance:
        assert case.fmt is not None
        return beyond(tolerance, got, o.x, case.fmt, o.scale, o.floor)
    return compare.quantized_bytes(got, case, o)


def _form(got: Result, case: Case) -> tuple[str, str] | None:
    """(what is there, what was promised) where a result has another form than its op's; values are compared later."""
    if case.op.endswith("quantize"):
        if not isinstance(got, BlockScaled):
            return str(type(got)), "a BlockScaled"
        have = (str(got.format), got.layout, tuple(got.shape))
        need = (case.format, case.layout, (case.m, case.k))
        if have != need:
            return str(have), str(need)
    elif not isinstance(got, Tensor):
        return str(type(got)), "a Tensor"
    for t in memory.tensors(got):
        if not t.is_contiguous():
            return f"{t.dtype} {list(t.shape)} with strides {t.stride()}", "a contiguous result"
    return None


def _shared(inputs: memory.Inputs, earlier: Result, got: Result, again: Result, case: Case) -> str | None:
    """A static scale may be handed through; nothing else may be."""
    owned = inputs.storages()
    given = owned - inputs.storages(but="scale")
    seen: set[int] = set()
    for result in (earlier, got, again):
        here = {t.untyped_storage().data_ptr() for t in memory.tensors(result) if t.numel()}
        if here & (owned - given):
            return "a result that shares memory with an operand"
        if (here & seen) - given:
            return "a result that shares memory with an earlier one"
        seen |= here
    return None


def _bytes(result: Result) -> list[Tensor]:
    return [memory.raw(t).clone() for t in memory.tensors(result)]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return not _differing(a, b)


def _differing(a: list[Tensor], b: list[Tensor]) -> list[tuple[int, tuple[Tensor, Tensor]]]:
    pairs = enumerate(zip(a, b, strict=True))
    return [(i, (x, y)) for i, (x, y) in pairs if x.shape != y.shape or not torch.equal(x, y)]
