"""Write bench/results/NAME-conformance.md and .json from what `blockscale conformance --json` printed on a device.

python bench/conformance_page.py REPORT.json --name h100 --date 2026-11-25 --command "blockscale conformance …"
    [--first-call COLD,WARM,OFF]      seconds of a first `linear` with a new self-test, a remembered one, and none
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from blockscale.conformance.report import Failure, Report

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    for name in ("--name", "--date", "--command"):
        parser.add_argument(name, required=True)
    parser.add_argument("--first-call", type=lambda s: [float(part) for part in s.split(",")])
    options = parser.parse_args()
    found = json.loads(options.report.read_text())
    found.pop("failed")
    found["about"].pop("system")  # the kernel's build says nothing about ours
    for errors in ("max_error", "row_error"):
        found[errors] = {name: math.inf if e is None else e for name, e in found[errors].items()}
    found["failures"] = [Failure(**f) for f in found["failures"]]
    report = Report(**found)
    text = page(report, options.date, options.command, options.first_call)
    (RESULTS / f"{options.name}-conformance.md").write_text(text)
    (RESULTS / f"{options.name}-conformance.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")


def page(report: Report, date: str, command: str, first_call: list[float] | None) -> str:
    lines = [
        f"# Conformance on {report.about['device']}",
        "",
        f"{date}: `{command}`; written by `bench/conformance_page.py`.",
        f"{report.cases} cases, {report.failed} failed, {report.untried} not tried, {report.seconds:.0f} s. "
        "A worst error of 1 would be the bound itself;",
        "docs/conformance.md says what is tried and where the bounds come from.",
        "",
        "```",
        report.text(),
        "```",
    ]
    if first_call:
        cold, warm, off = first_call
        lines += [
            "",
            "First `linear` of a process, [4, 1024] x [512, 1024], seconds:",
            "",
            "| the self-test runs (it compiles all that it tries) | its verdicts are remembered | no self-test |",
            "|---|---|---|",
            f"| {cold:.2f} | {warm:.2f} | {off:.2f} |",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
