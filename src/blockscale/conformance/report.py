"""What a run of the suite found, and how it is printed: plain data, JSON, text to paste into an issue."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 20
"""Failures that the text report prints in full."""


@dataclass(frozen=True)
class Failure:
    """One kernel's first wrong element in one case, or what it did besides computing."""

    kernel: str
    case: str
    coordinate: list[int] | None
    got: str
    want: str
    check: str = "value"
    """What it broke: value, shape, memory, input, alias, stale, repeat, raised (`suite`)."""
    op: str = ""


@dataclass
class Report:
    """What ran.

    kernels: number of cases of each kernel. max_error: its worst error over its bound. worst: the case of that error.
    row_error: the relative error of its worst row. about: versions, and whatever else tells two machines apart.
    untried: cases that were left when the time was up; a report with any is not green.
    """

    platform: str
    cases: int = 0
    passed: int = 0
    untried: int = 0
    seconds: float = 0.0
    kernels: dict[str, int] = field(default_factory=dict)
    max_error: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)
    row_error: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        return self.cases - self.passed

    @property
    def green(self) -> bool:
        """Something ran, all of it passed, nothing was left out."""
        return bool(self.cases) and not self.failed and not self.untried

    def add(self, kernel: str, case: str, failure: Failure | None, error: float, row_error: float = 0.0) -> None:
        """Count one kernel on one case."""
        self.cases += 1
        self.kernels[kernel] = self.kernels.get(kernel, 0) + 1
        if kernel not in self.max_error or error > self.max_error[kernel]:
            self.max_error[kernel], self.worst[kernel] = error, case
        self.row_error[kernel] = max(row_error, self.row_error.get(kernel, 0.0))
        if failure:
            self.failures.append(failure)
        else:
            self.passed += 1

    def to_json(self) -> dict[str, Any]:
        """As the CLI prints it."""
        finite = {name: error if math.isfinite(error) else None for name, error in self.max_error.items()}
        rows = {name: error if math.isfinite(error) else None for name, error in self.row_error.items()}
        return {**asdict(self), "failed": self.failed, "max_error": finite, "row_error": rows}

    def text(self) -> str:
        """A report to paste into an issue: platform, kernels, each failure with its first differing coordinate."""
        lines = [f"platform  {self.platform}"]
        lines += [f"{name:9} {value}" for name, value in self.about.items()]
        lines += [f"{'kernel':32} {'cases':>6} {'failed':>6}  worst error / bound"]
        for name, count in sorted(self.kernels.items()):
            failed = sum(f.kernel == name for f in self.failures)
            lines.append(f"{name:32} {count:6} {failed:6}  {self.max_error[name]:.3g} ({self.worst[name]})")
        for failure in self.failures[:SHOWN]:
            lines.append(f"FAIL {failure.kernel}: {failure.case} ({failure.check})")
            lines.append(f"     at {failure.coordinate}: got {failure.got}, want {failure.want}")
        if self.failed > SHOWN:
            lines.append(f"     … and {self.failed - SHOWN} more (--json has all)")
        if not self.cases:
            lines.append("no kernel accepted any case")
        left = f", {self.untried} cases not tried: time was up" if self.untried else ""
        lines.append(f"{self.passed} passed, {self.failed} failed{left} ({self.seconds:.0f} s)")
        return "\n".join(lines)
