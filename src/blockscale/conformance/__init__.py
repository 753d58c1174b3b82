"""The suite that any kernel, ours or a third party's, must pass.

>>> from blockscale.conformance import run
>>> report = run("cpu", kernel="reference", ops=("quantize",), quick=True)
>>> report.failed
0
"""

from .cases import Case, cases
from .report import Failure, Report
from .suite import Verdict, check, examine, run

__all__ = ["Case", "Failure", "Report", "Verdict", "cases", "check", "examine", "run"]
