"""`blockscale doctor`: what this machine is, each kernel run once before it is called usable, and what is missing."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from .. import environment, registry
from ..conformance import cases, check
from ..errors import BlockscaleError
from ..package_ops import recorded_schema
from ..platform import Platform, detect
from ..registry import explain
from ._output import console, print_json


def register(app: typer.Typer) -> None:
    @app.command("doctor")
    def command(
        device: Annotated[
            str | None, typer.Option(help="cpu, cuda, xpu …; else the first accelerator that answers, or cpu.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Detect the platform, run every accepting kernel on tiny problems, and name what is missing.

        Exit codes: 0; 1 where the device asked for does not answer.
        """
        report = examine(device)
        if as_json:
            print_json(report)
        else:
            _show(report)
        if report["platform"] is None:
            raise typer.Exit(1)


def examine(device: str | None = None) -> dict[str, Any]:
    """`{platform, features, kernels: [{op, kernel, accepted, ran, max_error, reasons}], …}`; see docs/conformance.md.

    device: None takes the best one that works. platform is None, and `problems` says why, where there is none.
    max_error: worst error over its bound, None when the kernel did not run. A kernel that raises or fails is listed
    with that as its reason, so a broken driver or package never ends the report.
    """
    problems: list[str] = []
    chosen, platform = _platform(device, problems)
    if text := environment.pairing():
        problems.append(text)
    rows = _kernels(platform, chosen) if platform else []
    problems += [f"kernels of {where} cannot be loaded: {why}" for where, why in registry.broken.items()]
    tools = [*environment.compilers(), *environment.packages()]
    return {
        "platform": str(platform) if platform else None,
        "features": dict(platform.features) if platform else {},
        "kernels": rows,
        "facts": environment.facts(chosen),
        "tools": [asdict(t) for t in tools],
        "operators": _operators(platform) if platform else [],
        "missing": _missing(tools, rows),
        "problems": problems,
    }


def _platform(device: str | None, problems: list[str]) -> tuple[str, Platform | None]:
    """The device to examine and its platform: the one asked for, else the first accelerator that answers, else cpu."""
    for candidate in (device,) if device else ("cuda", "xpu", "cpu"):
        assert candidate is not None
        try:
            platform = detect(candidate)
            if candidate != "cpu":
                torch.ones(1, device=candidate).item()
            return candidate, platform
        except Exception as e:  # whatever a driver raises; that there is no such device is no problem unless asked for
            if device or not isinstance(e, BlockscaleError):
                problems.append(f"device {candidate}: {type(e).__name__}: {str(e).splitlines()[0]}")
    return device or "cpu", None


def _kernels(platform: Platform, device: str) -> list[dict[str, Any]]:
    """A row for each kernel of each op; the accepting ones run every small case, with as many rows as they serve."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases(quick=True):
        for kernel, reasons, _ in explain(case.problem(), platform):
            row = rows.get((kernel.op, kernel.name))
            if row is None:
                row = {"op": kernel.op, "kernel": kernel.name, "accepted": False, "ran": False}
                row |= {"max_error": None, "reasons": []}
                rows[kernel.op, kernel.name] = row
            row["reasons"] += [r for r in reasons if r not in row["reasons"]]
            if reasons:
                continue
            failure, error = check(kernel, replace(case, m=max(case.m, kernel.m_range[0])), device)
            row["ran"] = failure is None and row["ran"] == row["accepted"]  # one fault is enough
            row["accepted"] = True
            if failure:
                row["reasons"].append(f"ran wrong: {failure.case}: got {failure.got}, want {failure.want}")
            if error != float("inf"):
                row["max_error"] = max(error, row["max_error"] or 0.0)
    return list(rows.values())


def _operators(platform: Platform) -> list[dict[str, Any]]:
    """Torch ops that packages bring: whether the installed schema is the one that our adapters were written for."""
    pairs = ((op, schema, recorded_schema(op)) for op, schema in platform.ops)
    return [{"op": op, "schema": have, "expected": need, "agrees": have == need} for op, have, need in pairs]


def _missing(tools: list[environment.Tool], rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What would become available, and the command that gets it. Only what would serve this device: a kernel that it
    is the one thing in the way of."""

    def alone(words: str) -> bool:
        return any(not row["accepted"] and all(words in reason for reason in row["reasons"]) for row in rows)

    wanted = {
        "g++": alone("native library"),
        "triton": alone("needs triton"),
        "deep_gemm": alone("package deep_gemm"),
        "vllm_xpu_kernels": alone("needs the package vllm-xpu-kernels"),
    }
    optional = {"transformers", "gguf", "matplotlib"}
    return [
        {"name": t.name, "state": t.state, "brings": t.purpose, "command": t.command}
        for t in tools
        if not t.there and (t.name in optional or wanted.get(t.name, False) or t.state.startswith("broken"))
    ]


def _show(report: dict[str, Any]) -> None:
    out = console()
    out.print(f"platform  {report['platform'] or 'none'}", highlight=False)
    for name, value in report["facts"].items():
        out.print(f"{name:9} {escape(value)}", highlight=False)
    for text in report["problems"]:
        out.print(f"[red]PROBLEM[/red]   {escape(text)}", highlight=False)
    table = Table("op", "kernel", "state", "error / bound")
    if not report["kernels"]:
        out.print("no kernel was tried")
    for row in report["kernels"]:
        if row["accepted"]:
            error = "" if row["max_error"] is None else f"{row['max_error']:.2g}"
            table.add_row(row["op"], row["kernel"], "runs" if row["ran"] else "[red]BROKEN[/red]", error)
    if report["kernels"]:
        out.print(table)
    for row in report["kernels"]:
        if row["accepted"] and not row["ran"]:
            reasons = escape("; ".join(row["reasons"]) or "no tiny problem fits it")
            out.print(f"[red]BROKEN[/red] {row['op']} {row['kernel']}: {reasons}", highlight=False)
    for op in report["operators"]:
        if not op["agrees"]:
            out.print(f"[red]OTHER SCHEMA[/red] {op['op']}: {escape(op['schema'])}", highlight=False)
            out.print(f"             expected {escape(str(op['expected']))}", highlight=False)
    out.print("tools")
    for tool in report["tools"]:
        out.print(f"  {tool['name']:16} {escape(tool['state'])}", highlight=False)
    if report["missing"]:
        out.print("to get more")
        for tool in report["missing"]:
            out.print(f"  {tool['brings']} ({tool['name']} {escape(tool['state'])}): {escape(tool['command'])}")
    if report["kernels"]:
        out.print("does not serve this device (every reason: --json, or blockscale explain)")
    refusing = {row["kernel"]: row for row in report["kernels"] if not row["accepted"]}
    usable = {row["kernel"] for row in report["kernels"] if row["accepted"]}
    for name, row in refusing.items():
        if name not in usable:
            out.print(f"  {name}: {escape(row['reasons'][0])}", highlight=False)
