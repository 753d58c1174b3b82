"""One report of several runs of bench/gemm.py: parts measured side by side, or rows measured later.

    python bench/gemm_merge.py OLD.json PART0.json PART1.json

Later files replace rows of earlier ones; the last one gives the environment and the ceilings. Rows that another version
of the kernels ran are marked in the report. Writes <card>-gemm.{md,json,svg} into bench/results or --out, and the
shipped table of the card with the new choices into --table.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from gemm_table import markdown, shipped
from roofline import draw
from shapes import NK, UNSEEN, M


def merge(reports: list[dict]) -> dict:
    """The reports' rows, later ones over earlier ones, in the order of shapes.py; everything else from the last."""
    rows = {(row["n"], row["k"], row["m"]): row for report in reports for row in report["rows"]}
    order = [(n, k, m) for n, k in (*NK, *UNSEEN) for m in M]
    runs = sum(report.get("runs", 1) for report in reports)
    merged = dict(reports[-1], runs=runs, rows=[rows[at] for at in order if at in rows])
    right = {text for report in reports for text in report["checked"]}
    merged["checked"] = sorted(right)
    # what one run did not reach, and another found right, is right; a fault stays one
    merged["bad"] = {text: why for report in reports for text, why in report["bad"].items()
                     if why != "not reached" or text not in right}  # fmt: skip
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=pathlib.Path, nargs="+")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--card", default="h100")
    parser.add_argument("--table", type=pathlib.Path, help="the card's table, to be brought up to date")
    args = parser.parse_args()
    merged = merge([json.loads(path.read_text()) for path in args.reports])
    (args.out / f"{args.card}-gemm.json").write_text(json.dumps(merged, indent=1) + "\n")
    (args.out / f"{args.card}-gemm.md").write_text(markdown(merged))
    draw(merged, args.out / f"{args.card}-gemm.svg")
    if args.table:
        table = shipped(merged["rows"], json.loads(args.table.read_text()))
        args.table.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
