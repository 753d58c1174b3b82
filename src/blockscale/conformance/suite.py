"""Run every accepting kernel on every case and hold it to the definition.

Errors are held to a bound that follows from the arithmetic, element by element, and the worst is reported:

    |got - want| <= u_out |want| + ((K + 16) 2^-24 + accumulation_error) Σ |x| |w|

u_out: unit roundoff of the result's dtype. (K + 16) 2^-24: the classic bound of an fp32 sum of K products in any
order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), with room for the scales.
`accumulation_error`: 0 unless the kernel declares one, as tensor cores that accumulate in fewer bits must. The
bound is far below what one wrong scale, row or tail does. Quantize ops are held to the bytes of the definition.

A kernel over a library whose quantizer is not bit-exact declares a `quantizer_tolerance` (`registry`). Its quantize op
is held to that instead of to bytes. One that also multiplies shows what it multiplies, by a method
`quantize_activations(problem, x, w)`: that is held to the tolerance, and the product to the bound above over it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import layouts, reference
from ..errors import UnknownNameError
from ..platform import detect
from ..registry import Kernel, QuantizerTolerance, explain, kernels
from ..tensor import BlockScaled
from .cases import Case, cases
from .operands import RMS_EPS, SWIGLU_LIMIT, Expected, Operands, expected, make
from .report import Failure, Report
from .tolerance import Found, beyond
from .workers import run_sharded


def run(
    device: torch.device | str = "cpu",
    *,
    kernel: str | None = None,
    ops: Iterable[str] | None = None,
    quick: bool = False,
    workers: int = 0,
    seconds: float | None = None,
) -> Report:
    """Try every accepting kernel on `device`.

    kernel: only this kernel or family. ops: only these. quick: one small case of each kind. workers: processes that
    share the cases, 0 for this one; they see kernels of packages and entry points, not those registered by hand here.
    seconds: start no case after that; what is left is counted as untried.
    Raises UnknownNameError when no kernel has the name.
    """
    if kernel is not None and not any(_named(k, kernel) for k in kernels()):
        raise UnknownNameError("kernel", kernel, sorted({k.name for k in kernels()}))
    report, began = Report(str(detect(device))), time.monotonic()
    wanted = None if ops is None else set(ops)
    chosen = [c for c in cases(quick=quick) if wanted is None or c.op in wanted]
    chosen = [c for c in chosen if candidates(c, device, kernel)]
    if workers:
        run_sharded(report, chosen, str(device), kernel, workers, seconds)
    else:
        for case in chosen:
            if seconds is not None and time.monotonic() - began > seconds:
                report.untried += 1
                continue
            prepared = prepare(case)
            for candidate in candidates(case, device, kernel):
                report.add(candidate.name, str(case), *check(candidate, case, device, *prepared))
    report.seconds = time.monotonic() - began
    return report


def candidates(case: Case, device: torch.device | str, name: str | None = None) -> list[Kernel]:
    """Kernels that accept a case on a device and serve its M; name: only this kernel or family."""
    return [
        d.kernel
        for d in explain(case.problem(), detect(device))
        if d.accepted and (name is None or _named(d.kernel, name)) and _serves(d.kernel, case.m)
    ]


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
    """One kernel on one case: the failure, if any, and the worst error as a multiple of what is allowed.

    An exception is a failure, not an end: the report goes on with the next case.
    """
    operands = operands or make(case)
    tolerance: QuantizerTolerance | None = getattr(kernel, "quantizer_tolerance", None)
    try:
        with _poisoned():
            got = _compute(kernel, case, operands, device)
            own = _own_activations(kernel, case, operands, device) if tolerance else None
    except Exception as e:
        return Failure(kernel.name, str(case), None, f"{type(e).__name__}: {e}", "a result"), float("inf")
    found: Found
    if isinstance(got, BlockScaled):
        if case.op != "quantize":
            found = _fused_errors(got, case, operands)
        elif tolerance:
            assert case.fmt is not None
            found = beyond(tolerance, got, operands.x, case.fmt, operands.scale, operands.floor)
        else:
            found = _differing_bytes(got, case, operands)
    else:
        found = (None, "", "", 0.0)
        if own is not None:
            assert tolerance is not None
            found = beyond(tolerance, own, operands.x, own.format, None, case.policy.act_floor)
            want = expected(case, operands, reference.dequantize(own))
        if found[0] is None:
            extra = float(getattr(kernel, "accumulation_error", 0.0))
            found = _over_bound(got, case, want or expected(case, operands), extra)
    coordinate, got_text, want_text, error = found
    if coordinate is None:
        return None, error
    return Failure(kernel.name, str(case), coordinate, got_text, want_text), error


def _named(kernel: Kernel, name: str) -> bool:
    return kernel.name == name or kernel.name.startswith(name + ".")


def _serves(kernel: Kernel, m: int) -> bool:
    lo, hi = kernel.m_range
    return lo <= m and (hi is None or m <= hi)


def _compute(kernel: Kernel, case: Case, o: Operands, device: torch.device | str) -> Tensor | BlockScaled:
    problem = case.problem()
    x = _to(o.x, device)
    if case.op == "quantize":
        return _on_cpu(kernel.run(problem, x, None if o.scale is None else o.scale.to(device), o.floor))
    if case.op == "swiglu_quantize":
        assert o.dense is not None
        return _on_cpu(kernel.run(problem, x, SWIGLU_LIMIT, o.dense.to(device), o.floor))
    if case.op == "rmsnorm_quantize":
        assert o.dense is not None
        return _on_cpu(kernel.run(problem, x, o.dense.to(device), RMS_EPS, o.floor))
    if case.op == "dense_linear":
        assert o.dense is not None
        return _on_cpu(kernel.run(problem, x, o.dense.to(device), None))
    assert o.w is not None
    w = layouts.convert(o.w, "row" if kernel.layout == "any" else kernel.layout).to(device)
    if case.op == "grouped_linear":
        assert o.offsets is not None
        return _on_cpu(kernel.run(problem, x, w, o.offsets.to(device)))
    if case.op == "matmul":
        x_format = problem.x_format
        assert x_format is not None
        quantized = reference.quantize_activations(o.x, x_format, o.w, case.policy)
        return _on_cpu(kernel.run(problem, quantized.to(device), w))
    return _on_cpu(kernel.run(problem, x, w, None if o.bias is None else o.bias.to(device)))


def _own_activations(kernel: Kernel, case: Case, o: Operands, device: torch.device | str) -> BlockScaled | None:
    """What a kernel with a quantizer of its own multiplies; None where it takes x as it comes."""
    own = getattr(kernel, "quantize_activations", None)
    if own is None or o.w is None:
        return None
    q: BlockScaled = own(case.problem(), _to(o.x, device), o.w.to(device))
    return q.to("cpu")


def _to(x: Tensor, device: torch.device | str) -> Tensor:
    """Move x and keep its strides: a copy would make a strided case contiguous."""
    if x.is_contiguous():
        return x.to(device)
    return x._base.to(device)[:, : x.shape[1]] if x._base is not None else x.to(device)


def _on_cpu(result: Tensor | BlockScaled) -> Tensor | BlockScaled:
    return result.to("cpu")


def _over_bound(got: Tensor, case: Case, want: Expected, extra: float) -> Found:
    if tuple(got.shape) != tuple(want.value.shape) or got.dtype != case.x_dtype:
        shape = f"{got.dtype} {list(got.shape)}"
        return [], shape, f"{case.x_dtype} {list(want.value.shape)}", float("inf")
    info = torch.finfo(got.dtype)
    bound = want.value.abs() * info.eps / 2 + want.magnitude * ((case.k + 16) * 2.0**-24 + extra) + info.tiny
    error = (got.double() - want.value).abs() / bound
    error = torch.where(want.value.isnan(), torch.where(got.isnan(), 0.0, torch.inf), error).nan_to_num(torch.inf)
    worst = int(error.argmax())
    at = [worst // got.shape[1], worst % got.shape[1]]
    top = float(error.flatten()[worst])
    if top <= 1:
        return None, "", "", top
    return at, f"{got[at[0], at[1]].item():.9g}", f"{want.value[at[0], at[1]].item():.9g}", top


def _differing_bytes(got: BlockScaled, case: Case, o: Operands) -> Found:
    assert case.fmt is not None
    want = layouts.convert(reference.quantize(o.x, case.fmt, scale=o.scale, floor=o.floor), case.layout)
    for part in ("data", "scale", "global_scale"):
        a, b = getattr(got, part), getattr(want, part)
        if a is None and b is None:
            continue
        if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
            return (
                [],
                f"{part} {a.dtype} {list(a.shape)}" if a is not None else "none",
                f"{part} {b.dtype} {list(b.shape)}",
                float("inf"),
            )
        raw_a, raw_b = (t.reshape(-1).view(torch.uint8).reshape(*t.shape, -1) for t in (a, b))
        differs = (raw_a != raw_b).any(-1)
        if differs.any():
            at = differs.nonzero()[0].tolist()
            texts = [f"{part} bytes {r[tuple(at)].tolist()}" for r in (raw_a, raw_b)]
            return at, texts[0], f"{texts[1]} ({int(differs.sum())} of {differs.numel()} differ)", float("inf")
    return None, "", "", 0.0


def _fused_errors(got: BlockScaled, case: Case, o: Operands) -> Found:
    """Fused ops may round exp and the mean differently: held to one step of the element type around the exact value."""
    assert o.dense is not None
    assert case.fmt is not None
    if case.op == "swiglu_quantize":
        h = reference.swiglu(o.x.double().float(), SWIGLU_LIMIT, o.dense)
    else:
        h = reference.rmsnorm(o.x.float(), o.dense.float(), RMS_EPS)
    want = reference.quantize(h, case.fmt, floor=o.floor)
    bc = case.fmt.block_shape(*want.shape)[1]
    step = layouts.decode_scale(want.scale).repeat_interleave(bc, 1)[:, : h.shape[1]]
    bound = h.abs() * (2.0**-4 + 2.0**-6) + step * 2.0**-8
    error = ((reference.dequantize(got) - h).abs() / bound).nan_to_num(torch.inf)
    at = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    top = float(error.max())
    if top <= 1:
        return None, "", "", top
    got_value = reference.dequantize(got)[at[0], at[1]].item()
    return at, f"{got_value:.9g}", f"{h[at[0], at[1]].item():.9g}", top


class _FillNew(TorchFunctionMode):
    """Fill what `torch.empty` and its kin return with bytes 0xFF: NaN in every float, -1 in integers."""

    _EMPTY = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self._EMPTY and out.numel() and out.is_contiguous():
            out.reshape(-1).view(torch.uint8).fill_(0xFF)
        return out


@contextmanager
def _poisoned() -> Iterator[None]:
    """Whatever a kernel allocates from Python starts as NaN, so an element that it never writes shows."""
    with _FillNew():
        yield
