"""The suite as pytest tests, for packages that bring kernels: one import, one line.

    # tests/test_conformance.py of your package
    from blockscale.conformance.testing import conformance_test

    test_conformance = conformance_test("mine")

gives one test for each case that a kernel named "mine" or "mine.*" accepts, named by the case, and one that fails when
there is no such case. Needs the package installed (or its kernels registered), and pytest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..platform import detect
from ..registry import Kernel
from .cases import Case, cases
from .report import Failure
from .suite import candidates, examine


def conformance_test(
    kernel: str, device: torch.device | str = "cpu", *, quick: bool = False
) -> Callable[[Case | None], None]:
    """A parametrised test function. kernel: a name or a family; device: where it runs; quick: one case of each kind."""
    import pytest

    chosen = [c for c in cases(quick=quick) if candidates(c, detect(device), kernel)]

    @pytest.mark.parametrize("case", chosen or [None], ids=lambda c: str(c) if c else "no case")
    def test(case: Case | None) -> None:
        assert case is not None, f"no kernel {kernel!r} accepts any case on {detect(device)}: see blockscale explain"
        for candidate in candidates(case, detect(device), kernel):
            failure = examine(candidate, case, device).failure
            assert failure is None, _text(candidate, failure)

    return test


def _text(kernel: Kernel, failure: Failure) -> str:
    at = "" if failure.coordinate is None else f" at {failure.coordinate}"
    return f"{kernel.name} ({failure.check}): {failure.case}{at}: got {failure.got}, want {failure.want}"
