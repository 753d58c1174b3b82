"""`make test-xpu`: our Triton kernels through Intel's compiler, on this CPU, without Intel hardware.

    python tests/xpu/run.py [--venv build/xpu-venv] [--out build/xpu.json] [--only codec|executed|compiled]

Installs what it needs: a venv of its own with triton-xpu (it takes the package name `triton`), Intel's CPU OpenCL
runtime and pyopencl; and `ocloc` from Debian, as root. Writes one row for each kernel, target and stage, and exits 1
if any is wrong. What this can and cannot show is in docs/xpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cases import EXECUTED, Row, decode_all, encode_all, execute, linears_split_k, shipped
from executor import Worker

from blockscale.kernels.triton import capability
from blockscale.platform import Platform

REQUIREMENTS = (
    "triton-xpu==3.3.0b1",
    "pyopencl==2026.1.4",
    "intel-opencl-rt==2026.2.0",
    "intel-cmplr-lib-rt==2026.2.0",  # needed by intel-opencl-rt, which does not say so
    "numpy<3",
)
TARGETS = ("pvc", "bmg", "dg2")
OCLOC_PACKAGES = ("intel-ocloc", "intel-opencl-icd")
"""Where Debian has it: a package of its own since trixie, before that beside the OpenCL driver."""


def venv_python(folder: Path) -> Path:
    """The interpreter of the XPU venv, made and filled if it is not there."""
    python = folder / "bin" / "python"
    stamp = folder / ".ready"
    if not stamp.exists() or stamp.read_text() != "\n".join(REQUIREMENTS):
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        stamp.write_text("\n".join(REQUIREMENTS))
    return python


def ocloc() -> str | None:
    """Intel's offline compiler, installed if that is possible."""
    if not shutil.which("ocloc") and shutil.which("apt-get") and os.geteuid() == 0:
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
        subprocess.run(["apt-get", "update"], **quiet)
        for package in OCLOC_PACKAGES:
            subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", package], **quiet)
    return shutil.which("ocloc")


def machine_code(tool: str, name: str, spv: bytes, flags: str) -> Row:
    """PVC machine code of a launch, and how many registers the compiler spilled."""
    row = Row(name, "pvc", "machine code", 1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "k.spv").write_bytes(spv)
        command = [tool, "compile", "-spirv_input", "-file", "k.spv", "-device", "pvc", "-out_dir", ".", "-output", "k"]
        command += ["-options", flags] if flags else []
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
        made = [p for p in Path(folder).iterdir() if p.suffix == ".bin"]
    said = done.stdout + done.stderr
    spilled = [int(n) for n in re.findall(r"spilled around (\d+)", said)]
    row.spills, row.seconds = sum(spilled), round(time.monotonic() - began, 1)
    if done.returncode or not made:
        row.fault = f"ocloc: {said.strip()[-300:]}"
    elif row.spills:
        row.fault = f"{row.spills} registers spilled in a tile that ships"
    return row


def compiled(worker: Worker) -> Iterator[Row]:
    """Every launch that ships, for every target; PVC's go on to machine code."""
    tool = ocloc()
    for target in TARGETS:
        for name, requests in shipped(target).items():
            row = Row(name, target, "compiled", len(requests), dpas=0, seconds=0.0)
            binaries = []
            try:
                for request in requests:
                    answer = worker.ask(do="compile", **{**request, "buffers": {}})
                    binaries.append((answer["spv"], answer["flags"]))
                    row.dpas = (row.dpas or 0) + answer["dpas"]
                    row.seconds = round((row.seconds or 0.0) + answer["compile_s"], 1)
            except RuntimeError as e:
                row.fault = str(e)[:600]
            multiplies = name.startswith(("linear", "grouped"))
            if not row.fault and bool(row.dpas) != (multiplies and target != "dg2"):
                row.fault = f"{row.dpas} matrix instructions, expected {'some' if multiplies else 'none'}"
            yield row
            if target == "pvc" and not row.fault:
                if tool is None:
                    yield Row(name, target, "machine code", 0, fault="no ocloc: install Debian's intel-ocloc as root")
                for spv, flags in binaries if tool else []:
                    yield machine_code(tool or "", name, spv, flags)


def executed(worker: Worker) -> Iterator[Row]:
    for line in EXECUTED:
        yield execute(worker, *line)
    yield execute(worker, *linears_split_k(), split=2)


def codec(worker: Worker) -> Iterator[Row]:
    """Encode and decode of every element, exhaustively, and the compiler's own cast, which is known to be wrong."""
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


STAGES: dict[str, Callable[[Worker], Iterator[Row]]] = {"codec": codec, "executed": executed, "compiled": compiled}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=Path("build/xpu-venv"))
    parser.add_argument("--out", type=Path, default=Path("build/xpu.json"))
    parser.add_argument("--only", choices=list(STAGES), action="append")
    chosen = parser.parse_args(argv)
    worker = Worker(venv_python(chosen.venv.absolute()))
    rows = []
    began = time.monotonic()
    for stage in chosen.only or STAGES:
        for row in STAGES[stage](worker):
            rows.append(row)
            what = row.equal_bytes or (f"{row.max_error:.3g} of the bound" if row.max_error is not None else "")
            what += f" {row.spills} spills" if row.spills is not None else ""
            print(f"{row.target:4} {row.stage:12} {row.kernel:36} {row.seconds or 0:6.1f} s  {what:28} "
                  f"{row.fault or 'ok'}", flush=True)  # fmt: skip
    worker.close()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    versions = dict(r.split("==") for r in REQUIREMENTS if "==" in r)
    chosen.out.write_text(json.dumps({"versions": versions, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    failed = sum(row.fault is not None for row in rows)
    print(f"{time.monotonic() - began:.0f} s -> {chosen.out}")
    print(f"{len(rows) - failed} passed, {failed} failed")
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
