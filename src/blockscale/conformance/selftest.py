"""Try a kernel before its first use on a device, once for each driver and set of versions.

BLOCKSCALE_SELF_TEST=1 (or `enable()`) turns it on. A kernel that is new here runs a handful of conformance cases in a
process of its own, so that one that crashes or breaks the device takes nothing down with it; the kernels of a plan run
side by side. The verdict is recorded (`verdicts`); a failure becomes a feature of the platform, and `explain` refuses
the kernel with that reason.

A first use should not wait long, and on a GPU it waits for compilers: cases differ in what x holds and in M, and have
two shapes of the weight in all, of which one is the problem's own where that is small.

A test that could not be made, for want of memory or of a process, is no verdict: the kernel is used and tried again in
the next process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from .. import registry, verdicts
from ..observe import logger
from ..platform import detect, identity
from ..registry import Kernel, Problem
from .cases import Case
from .suite import candidates, examine
from .workers import Died, Process

_LARGEST = 1 << 22
"""Elements of a weight up to which the problem's own shape is tried too."""
_undecided: set[str] = set()


def enable() -> None:
    """Try kernels on their first use from now on in this process."""
    registry.verifier = verify


def disable() -> None:
    """Undo `enable`. Recorded failures stay."""
    registry.verifier = None


def verify(kernels: Sequence[Kernel], problem: Problem, device: torch.device) -> bool:
    """Whether these kernels may serve the problem's format on this device; tries those that nothing is recorded of."""
    if device.type == "meta":
        return True
    key = identity(detect(device))
    known, new = verdicts.read(key), dict[str, Kernel]()
    for kernel in kernels:
        name = registry.tested_as(kernel, problem)
        if kernel.priority > 0 and name not in _undecided:  # 0: the last resort, nothing could take its place
            if name not in known:
                new[name] = kernel
            elif known[name] != verdicts.PASSED:
                return False
    with ThreadPoolExecutor(max(1, len(new))) as pool:
        made = pool.map(lambda kernel: attempt(kernel, problem, device), new.values())
        found = dict(zip(new, made, strict=True))
    failed = {name: verdict for name, verdict in found.items() if verdict not in (None, verdicts.PASSED)}
    for name, verdict in found.items():
        if verdict is None:
            _undecided.add(name)
        else:
            verdicts.record(key, name, verdict)
    for name, verdict in failed.items():
        logger.warning("self-test: %s on %s %s", name, device, verdict)
    if failed:
        detect.cache_clear()
        registry.forget()
    return not failed


def attempt(kernel: Kernel, problem: Problem, device: torch.device) -> str | None:
    """ "passed", "failed: why", or None where it could not be tried."""
    chosen = list(_cases(kernel, problem, device))
    here = registry.registered_here(kernel)  # other processes do not know it
    process = None if here else Process(str(device), torch.get_num_threads())
    try:
        for case in chosen:
            why = _run_here(kernel, case, device) if process is None else _run_there(process, kernel, case)
            if why is not None and "OutOfMemory" in why:
                return None
            if why is not None:
                return _one_line(f"failed: {case}: {why}")
    except Died as died:
        if not died.kernel:  # before the kernel ran: the process could not start
            logger.warning("self-test: not made, %s", died.how)
            return None
        return _one_line(f"failed: {died.how} in {chosen[0]}")
    finally:
        if process is not None:
            process.stop()
    return verdicts.PASSED if chosen else None


def _run_here(kernel: Kernel, case: Case, device: torch.device) -> str | None:
    failure = examine(kernel, case, device).failure
    return f"got {failure.got}, want {failure.want}" if failure else None


def _run_there(process: Process, kernel: Kernel, case: Case) -> str | None:
    answers = list(process.ask(case, kernel.name, []))
    if not answers:
        raise Died("", f"a new process does not know {kernel.name}")
    failure = answers[0]["failure"]
    return f"got {failure['got']}, want {failure['want']}" if failure else None


def _cases(kernel: Kernel, problem: Problem, device: torch.device) -> Iterator[Case]:
    """One weight with ragged rows and columns: few rows of x, one, more than a tile, NaN, zeros. One regular weight."""
    low, high = kernel.m_range
    format = problem.format.name if problem.format else None
    base = Case(
        problem.op, format, max(low, 3), 192 if problem.n else 0, 576, problem.out_dtype, str(problem.numerics),
        groups=min(problem.groups, 4),
    )  # fmt: skip
    own = problem.n * problem.k <= _LARGEST
    wanted = [
        base,
        replace(base, m=low),
        replace(base, m=max(low, 70)),
        replace(base, edge="nan_row"),
        replace(base, edge="zero_row"),
        replace(base, n=problem.n if own else 512, k=problem.k if own else 1024),
    ]
    for case in dict.fromkeys(wanted):
        if (high is None or case.m <= high) and kernel in candidates(case, detect(device)):
            yield case


def _one_line(text: str) -> str:
    """As a feature's value may be: no line breaks, no plus signs."""
    return " ".join(text.split()).replace("+", "plus ")[:300]
