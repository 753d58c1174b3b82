"""`make test-xpu`: our Triton kernels through Intel's compiler, on this CPU, without Intel hardware.

    python tests/xpu/run.py [--folder build/xpu] [--out build/xpu.json] [--only codec|executed|compiled]… [--match TEXT]
                            [--record]

Installs what it needs: a venv of its own with triton-xpu (it takes the package name `triton`), Intel's CPU OpenCL
runtime and pyopencl; and `ocloc` from Debian, as root. Writes one row for each kernel, target and stage, and exits 1
if any is wrong. What was compiled and built is kept beside the venv, keyed by its source, for the next run. What this
can and cannot show is in docs/xpu.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cases import EXECUTED, PLANTED, Row, decode_all, encode_all, execute
from executor import Worker
from install import ocloc, venv_python, versions
from shipped import shipped

from blockscale.kernels.triton import capability
from blockscale.platform import Platform

TARGETS = ("pvc", "bmg", "dg2")
RECORD = Path(__file__).parents[2] / "docs" / "xpu.json"
MULTIPLIES = ("linear", "grouped")


def machine_code(tool: str, target: str, spv: bytes, flags: str) -> tuple[int, str]:
    """Machine code of one launch: (registers that the compiler spilled, what went wrong)."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "k.spv").write_bytes(spv)
        command = [tool, "compile", "-spirv_input", "-file", "k.spv", "-device", target, "-out_dir", "."]
        command += ["-output", "k", *(["-options", flags] if flags else [])]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, check=False, timeout=600, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return 0, "ocloc: over 600 s"
        made = [p for p in Path(folder).iterdir() if p.suffix == ".bin" and p.stat().st_size]
    said = done.stdout + done.stderr
    spilled = sum(int(n) for n in re.findall(r"spilled around (\d+)", said))
    return spilled, "" if done.returncode == 0 and made else f"ocloc: {said.strip()[-300:]}"


def compiled(worker: Worker, match: str = "") -> Iterator[Row]:
    """Every launch that ships, for every target, and on to machine code where the installed ocloc knows the chip."""
    tool, why = ocloc()
    if tool is None:
        yield Row("ocloc", "all", "machine code", 0, fault=why)
    with ThreadPoolExecutor(2) as pool:
        waiting: list[tuple[Row, list[Future[tuple[int, str]]]]] = []
        for target in TARGETS:
            known = tool is not None and "Cannot get HW Info" not in machine_code(tool, target, b"", "")[1]
            for name, requests in shipped(target).items():
                if match not in name:
                    continue
                row, binaries = compile_row(worker, name, target, requests)
                yield row
                if known and not row.fault:
                    jobs = [pool.submit(machine_code, tool or "", target, *b) for b in binaries]
                    waiting.append((Row(name, target, "machine code", row.cases), jobs))
        for row, jobs in waiting:
            row.spills = sum(job.result()[0] for job in jobs)
            row.fault = next((job.result()[1] for job in jobs if job.result()[1]), None)
            if row.spills and not row.fault:
                row.fault = f"{row.spills} registers spilled in a tile that ships"
            yield row


def compile_row(
    worker: Worker, name: str, target: str, requests: list[dict[str, object]]
) -> tuple[Row, list[tuple[bytes, str]]]:
    """All launches of a row as SPIR-V: (row, each different binary with its flags)."""
    row, began, binaries = Row(name, target, "compiled", len(requests), dpas=0), time.monotonic(), {}
    multiplies = name.startswith(MULTIPLIES)
    try:
        for request in requests:
            answer = worker.ask(do="compile", **request)
            binaries[answer["spv"], answer["flags"]] = answer["dpas"]
            if bool(answer["dpas"]) != (multiplies and target != "dg2"):
                row.fault = f"{answer['dpas']} matrix instructions, expected {'some' if multiplies else 'none'}"
    except RuntimeError as e:
        row.fault = str(e)[-600:]
    row.dpas, row.seconds = sum(binaries.values()), round(time.monotonic() - began, 1)
    return row, list(binaries)


def executed(worker: Worker, match: str = "") -> Iterator[Row]:
    for line in EXECUTED:
        if match in line.name:
            yield execute(worker, line)
    if not match:
        yield planted(worker)


def planted(worker: Worker) -> Row:
    """A fault must show: one scale of W8A8's weights off by 1/64."""
    row = execute(worker, PLANTED)
    seen, row.max_error = row.fault, None
    row.fault = None if seen and "at [" in seen else f"a planted fault went unnoticed: {seen}"
    return row


def codec(worker: Worker, match: str = "") -> Iterator[Row]:
    """Encode and decode of every element, exhaustively, and the compiler's own cast, which is known to be wrong."""
    if match:
        return
    for target, element in (("pvc", "fp8"), ("dg2", "fp8"), ("pvc", "fp8e5m2"), ("pvc", "fp8fnuz")):
        yield _bytes(f"encode {element}", target, lambda t=target, e=element: encode_all(worker, t, e))
    for target, element, dtype in (
        ("pvc", "fp8", torch.float16), ("dg2", "fp8", torch.float16), ("pvc", "fp8", torch.bfloat16),
        ("pvc", "fp8e5m2", torch.bfloat16), ("pvc", "fp8fnuz", torch.float16),
    ):  # fmt: skip
        short = str(dtype).removeprefix("torch.")
        yield _bytes(
            f"decode {element} to {short}", target, lambda t=target, e=element, d=dtype: decode_all(worker, t, e, d)
        )
    yield native_cast(worker)


def _bytes(name: str, target: str, both: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Row:
    row, began = Row(name, target, "executed", 1), time.monotonic()
    try:
        got, want = both()
        equal = int((got == want).sum())
        row.equal_bytes = f"{equal} of {want.numel()}"
        if equal != want.numel():
            row.fault = f"{want.numel() - equal} differ"
    except RuntimeError as e:
        row.fault = str(e)[:600]
    row.seconds = round(time.monotonic() - began, 1)
    return row


def native_cast(worker: Worker) -> Row:
    """triton-xpu 3.3.0b1 casts fp32 to fp8e4nv wrongly: nothing beyond 256. So no platform of XPU may use its cast."""
    row = Row("native cast to fp8e4nv (known wrong, must be refused)", "pvc", "executed", 1)
    got, want = encode_all(worker, "pvc", "fp8", native=True)
    finite = (want & 0x7F) != 0x7F
    largest = got[finite].view(torch.float8_e4m3fn).float().abs().max().item()
    equal = int((got == want).sum())
    row.equal_bytes = f"{equal} of {want.numel()}"
    if largest != 256.0 or equal == want.numel():
        row.fault = f"the bug is gone (largest {largest}): the version gate can move"
    refused = [
        capability.native_cast(Platform.parse(f"xpu:{t}+triton={v}"), "fp8") for t in TARGETS for v in ("3.3.0", "3.4")
    ]
    if any(refused):
        row.fault = "capability.native_cast lets an XPU cast"
    return row


STAGES: dict[str, Callable[[Worker, str], Iterator[Row]]] = {
    "codec": codec, "executed": executed, "compiled": compiled,
}  # fmt: skip


def recorded(report: dict[str, Any]) -> str:
    """The report for docs/xpu.json: one row a line, without what changes with a tile or a machine."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "dpas")} for row in report["rows"]]
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"versions": {json.dumps(report["versions"])},\n"rows": [\n{lines}\n]}}\n'


def compare(rows: list[Row]) -> Row:
    """Whether docs/xpu.json, and so docs/platforms.md, still tells what ran. Rows may be added (another ocloc)."""
    answer = Row("docs/xpu.json", "all", "compared", 0)
    ran = {(r.kernel, r.target, r.stage): asdict(r) for r in rows}
    for told in json.loads(RECORD.read_text())["rows"]:
        answer.cases += 1
        now = ran.get((told["kernel"], told["target"], told["stage"]), {})
        differs = [k for k in ("cases", "equal_bytes", "spills") if now.get(k) != told[k]]
        if differs and answer.fault is None:
            name = f"{told['kernel']} {told['target']} {told['stage']}"
            answer.fault = f"{name}: {', '.join(differs)} changed; run with --record, then make docs"
    return answer


def text(row: Row) -> str:
    what = row.equal_bytes or (f"{row.max_error:.3g} of the bound" if row.max_error is not None else "")
    what += f" {row.spills} spills" if row.spills is not None else ""
    seconds = "" if row.seconds is None else f"{row.seconds:.1f} s"
    return f"{row.target:4} {row.stage:12} {row.kernel:42} {seconds:>8}  {what:22} {row.fault or 'ok'}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/xpu"), help="the venv and the caches")
    parser.add_argument("--out", type=Path, default=Path("build/xpu.json"))
    parser.add_argument("--only", choices=list(STAGES), action="append")
    parser.add_argument("--record", action="store_true", help="write docs/xpu.json, what docs/platforms.md tells")
    parser.add_argument("--match", default="", help="only rows of kernels whose name holds this (no codec rows)")
    chosen = parser.parse_args(argv)
    began = time.monotonic()
    folder = chosen.folder.absolute()
    worker = Worker(venv_python(folder / "venv"), folder / "cache")
    rows: list[Row] = []
    try:
        for stage in chosen.only or STAGES:
            for row in STAGES[stage](worker, chosen.match):
                rows.append(row)
                print(text(row), flush=True)
    finally:
        worker.close()
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"versions": versions(), "seconds": round(time.monotonic() - began), "rows": [asdict(r) for r in rows]}
        chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    if chosen.record:
        RECORD.write_text(recorded(report))
    elif not chosen.only and not chosen.match:
        rows.append(compare(rows))
        print(text(rows[-1]))
    failed = sum(row.fault is not None for row in rows)
    print(f"{time.monotonic() - began:.0f} s -> {chosen.out}")
    print(f"{len(rows) - failed} passed, {failed} failed", flush=True)
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
