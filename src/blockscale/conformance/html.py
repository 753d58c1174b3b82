"""The report as one HTML file without scripts or outside references: to attach, to keep beside a release."""

from __future__ import annotations

from html import escape

from .report import Report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td:first-child code { white-space: nowrap }
.bad { color: #b00020; font-weight: 600 } .good { color: #1b6e2d; font-weight: 600 }
code { font-size: 13px; overflow-wrap: anywhere }
"""


def page(report: Report) -> str:
    """Platform and versions, a row for each kernel, every failure with its coordinate and bytes."""
    left = f", {report.untried} not tried" if report.untried else ""
    verdict = f"{report.passed} passed, {report.failed} failed{left}"
    kernels = [
        f"<tr><td><code>{escape(name)}</code></td><td class=n>{count}</td><td class=n>{_failures(report, name)}</td>"
        f"<td class=n>{report.max_error[name]:.3g}</td><td class=n>{report.row_error[name]:.2g}</td>"
        f"<td><code>{escape(report.worst[name])}</code></td></tr>"
        for name, count in sorted(report.kernels.items())
    ]
    failures = [
        f"<tr><td><code>{escape(f.kernel)}</code></td><td>{escape(f.check)}</td><td><code>{escape(f.case)}</code></td>"
        f"<td><code>{escape(str(f.coordinate))}</code></td><td><code>{escape(f.got)}</code></td>"
        f"<td><code>{escape(f.want)}</code></td></tr>"
        for f in report.failures
    ]
    facts = [f"<tr><th>{escape(k)}</th><td><code>{escape(v)}</code></td></tr>" for k, v in report.about.items()]
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8><title>blockscale conformance</title>",
            f"<style>{_STYLE}</style><h1>blockscale conformance</h1>",
            f'<p class="{"good" if report.green else "bad"}">{verdict} ({report.seconds:.0f} s)</p>',
            f"<table><tr><th>platform</th><td><code>{escape(report.platform)}</code></td></tr>{''.join(facts)}</table>",
            "<h2>Kernels</h2><p>Error over bound: 1 is what the arithmetic allows (docs/conformance.md). Quantize ops "
            "are compared byte by byte: 0.</p>",
            "<table><tr><th>kernel<th class=n>cases<th class=n>failed<th class=n>worst error / bound"
            "<th class=n>worst row, relative<th>its case</tr>",
            *kernels,
            "</table>",
            "<h2>Failures</h2>" if failures else "",
            "<table><tr><th>kernel<th>check<th>case<th>at<th>got<th>want</tr>" if failures else "",
            *failures,
            "</table>" if failures else "",
            "</html>",
        ]
    )


def _failures(report: Report, kernel: str) -> str:
    count = sum(f.kernel == kernel for f in report.failures)
    return f"<span class=bad>{count}</span>" if count else "0"
