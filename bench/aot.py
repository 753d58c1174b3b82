"""Compile the Triton kernels for every target ahead of time, on a machine without any of them.

    python bench/aot.py [--target sm_90]… [--kernel grouped]… [--out build/aot.json]

Launches are recorded, not made up: the launchers run on CPU tensors with a described platform, and what they would
hand to the chip is compiled for it, so tiles, constants and alignments are those that ship. A row fails when
something does not compile within LIMIT_S, when the native matrix instruction is not exactly where
EXPECTED says, or when the compiler reports spills in a tile that ships. Exit status 1 if any row fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import blockscale
from aot_compile import compile_for, platform_of, recorded, spills, weight
from blockscale.formats import get_format
from blockscale.numerics import get_numerics
from blockscale.platform import Platform
from blockscale.tensor import BlockScaled

LIMIT_S = 120.0  # processor seconds that a row may take; the clock on the wall may take four times that
NATIVE = {
    "sm_89": r"mma\.sync[\w.]*m16n8k32[\w.]*e4m3", "sm_90": r"wgmma\.mma_async[\w.]*e4m3\.e4m3",
    "sm_100": r"tcgen05\.mma[\w.:]*kind::f8f6f4", "sm_120": r"mma\.sync[\w.]*m16n8k32[\w.:]*e4m3",
    "gfx942": r"v_mfma_\w*fp8_fp8", "gfx950": r"v_mfma_\w*f8f6f4|v_mfma_\w*fp8_fp8", "gfx1201": r"v_wmma_\w*fp8_fp8",
}  # fmt: skip
TARGETS = (
    "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201",
)  # fmt: skip
RECORD = Path(__file__).parents[1] / "docs" / "aot.json"  # what docs/platforms.md shows
SHOWN = ("target", "kernel", "compiled", "seconds", "native_instruction", "spills")
EXPECTED = {"gemm_w8a8", "grouped"}  # hold NATIVE[target]'s instruction; all others, and targets without one, must not


def quantize_case(p: Platform) -> None:
    from blockscale.kernels.triton import quantize as q

    x, fmt = torch.empty(4096, 7168, dtype=torch.bfloat16), get_format("fp8_1x128")
    for m in (1, 4096):
        q.quantize(x[:m], fmt, p, layout="tma")
    q.quantize(x, get_format("fp8_1x128_ue8m0"), p, layout="ue8m0x4")
    q.quantize(x, get_format("mxfp4"), p)
    q.quantize(x, get_format("fp8_128x128"), p)
    q.swiglu_quantize(x, fmt, p, limit=7.0)
    q.rmsnorm_quantize(x, torch.empty(7168, dtype=torch.bfloat16), 1e-6, fmt, p)


def gemm_case(p: Platform, numerics: str) -> None:
    from blockscale.kernels.triton import capability, gemm

    x, w = torch.empty(4096, 7168, dtype=torch.bfloat16), weight("fp8_128x128", 4096, 7168, p)
    for m in (1, 64, 4096):
        gemm.linear(x[:m], w, None, get_numerics(numerics), torch.bfloat16, p)
        if capability.dot_element(p, "fp8") and numerics == "checkpoint":  # elsewhere the codec is what ran just now
            gemm.linear(x[:m], w, None, get_numerics(numerics), torch.bfloat16, p, native=False)
    short = weight("fp8_32x32_ue8m0", 4096, 7168, p)  # exact with their scales, or promoted every 32 of K
    for m in (1, 64, 128, 4096):
        gemm.linear(x[:m], short, None, get_numerics(numerics), torch.bfloat16, p)
    if numerics == "weight_only":  # scales of short groups that cannot be folded: steps as short
        w = weight("mxfp4", 4096, 7168, p)
        w = BlockScaled.trusted(w.data, w.scale.to(torch.bfloat16), w.format, "row", w.shape)
        for m in (64, 100, 4096):
            gemm.linear(x[:m], w, None, get_numerics(numerics), torch.bfloat16, p)
        gemm.linear(x[:64], w, None, get_numerics(numerics), torch.bfloat16, p, invariant=True)
    w = weight("fp8_128x128", 129, 200, p)  # ragged in everything: masks where the others need none
    gemm.linear(x[:5, :200], w, None, get_numerics(numerics), torch.bfloat16, p)


def grouped_case(p: Platform) -> None:
    from blockscale.kernels.triton import grouped

    x, offsets = torch.empty(4096, 2048, dtype=torch.bfloat16), torch.empty(8, dtype=torch.int32)
    kinds = [
        ("fp8_128x128", "checkpoint"), ("mxfp4", "deepseek_v4"), ("nvfp4", "weight_only"), ("nvfp4", "checkpoint"),
        ("mxfp8", "checkpoint"),
    ]  # fmt: skip
    for name, numerics in kinds:
        w, how = weight(name, 4096, 2048, p, experts=8), (get_numerics(numerics), torch.bfloat16, p)
        for m in (16, 4096):
            grouped.grouped_linear(x[:m], w, offsets, *how)
        if name == "fp8_128x128":
            grouped.grouped_linear(x[:64], w, offsets, *how, rows="masked")
            grouped.grouped_linear(x[:4], w, offsets.view(4, 2), *how, rows="pairs")


CASES: dict[str, Callable[[Platform], None]] = {
    "quantize": quantize_case,
    "gemm_w8a8": lambda p: gemm_case(p, "checkpoint"),
    "gemm_weight_only": lambda p: gemm_case(p, "weight_only"),
    "grouped": grouped_case,
}


def compile_case(target: str, kernel: str) -> dict[str, Any]:
    """Compile every distinct launch of the case; one row of the table."""
    started = _processor_seconds()
    with recorded() as launches:
        CASES[kernel](platform_of(target))
    native: str | None = None
    details: list[dict[str, Any]] = []
    total: int | None = 0
    for fn, args, kwargs in launches:
        began = time.monotonic()
        compiled = compile_for(target, fn, args, kwargs)
        text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        found = re.search(NATIVE[target], text) if target in NATIVE else None
        native = native or (found[0] if found else None)
        spilled = spills(compiled, target)
        total = None if spilled is None or total is None else total + spilled
        tile = "x".join(str(kwargs[name]) for name in ("BM", "BN", "BK") if name in kwargs)
        details.append({
            "fn": fn.__name__, "tile": tile, "seconds": round(time.monotonic() - began, 1), "spills": spilled,
            "shared": compiled.metadata.shared, "native": found[0] if found else None,
        })  # fmt: skip
    seconds = round(_processor_seconds() - started, 1)
    return {"target": target, "kernel": kernel, "compiled": True, "seconds": seconds, "native_instruction": native,
            "spills": total, "launches": details}  # fmt: skip


def _processor_seconds() -> float:
    """Spent by this process and the assemblers that it ran: other work on the machine does not count."""
    return sum(os.times()[:4])


class Compiler:
    """`compile_case` in a process of its own, so that a compiler that hangs or aborts costs one row."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def row(self, target: str, kernel: str) -> dict[str, Any]:
        """One row; where it failed, "error" says why and the process may be gone."""
        row: dict[str, Any] = {"target": target, "kernel": kernel, "compiled": False, "seconds": LIMIT_S,
                               "native_instruction": None, "spills": None}  # fmt: skip
        try:
            self.pipe.send((target, kernel))
            if self.pipe.poll(4 * LIMIT_S):
                return {**row, **self.pipe.recv()}
            error = f"over the limit of {4 * LIMIT_S:g} s"
        except (EOFError, OSError):
            error = "the compiler aborted"
        self.process.kill()
        self.process.join()
        return {**row, "error": error}


def _serve(pipe: Any) -> None:
    while True:
        try:
            pipe.send(compile_case(*pipe.recv()))
        except EOFError:
            return
        except Exception as e:
            pipe.send({"error": f"{type(e).__name__}: {str(e).strip()[-400:]}"})


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row; nothing if it is as it should be."""
    if not row["compiled"]:
        return [row["error"]]
    if row["seconds"] > LIMIT_S:
        return [f"{row['seconds']:g} s, over the limit of {LIMIT_S:g} s"]
    wanted = row["target"] in NATIVE and row["kernel"] in EXPECTED
    found = []
    if wanted and not row["native_instruction"]:
        found.append(f"no native matrix instruction ({NATIVE[row['target']]})")
    if not wanted and row["native_instruction"]:
        found.append(f"unexpected {row['native_instruction']}")
    if row["spills"]:
        found.append(f"{row['spills']} spilled")
    return found


def fingerprint() -> str:
    """What the rows depend on: the kernels, their launchers and tiles, and what compiles them."""
    root, here = Path(blockscale.__file__).parent, Path(__file__).parent
    kernels, ours = (root / "kernels" / "triton").glob("*.py"), here.glob("aot*.py")
    files = [*sorted(kernels), root / "tuning.py", *sorted(ours)]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--kernel", action="append", choices=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("build/aot.json"))
    parser.add_argument("-v", "--verbose", action="store_true", help="one line for each compiled launch")
    parser.add_argument("--resume", action="store_true", help="keep rows of --out that the same sources gave")
    parser.add_argument("--record", action="store_true", help="write the complete table to docs/aot.json; else compare")
    chosen = parser.parse_args(argv)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # what is timed is compiled, not found
    sources = fingerprint()
    kept = json.loads(chosen.out.read_text()) if chosen.resume and chosen.out.exists() else []
    known = {(row["target"], row["kernel"]): row for row in kept if row.get("sources") == sources}
    rows, bad, compiler = [], 0, Compiler()
    for target in chosen.target or TARGETS:
        for kernel in chosen.kernel or CASES:
            if not compiler.process.is_alive():
                compiler = Compiler()
            row = known.get((target, kernel)) or {**compiler.row(target, kernel), "sources": sources}
            wrong = faults(row)
            bad += bool(wrong)
            rows.append(row)
            print(f"{target:8} {kernel:17} {row['seconds']:6.1f} s  {row['native_instruction'] or '-':44} "
                  f"{'; '.join(wrong) or 'ok'}", flush=True)  # fmt: skip
            for one in row.get("launches", []) * chosen.verbose:
                print("        ", one, flush=True)
            chosen.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} rows, {bad} wrong, {sum(r['seconds'] for r in rows):.0f} s of processor -> {chosen.out}")
    if chosen.record and not bad and len(rows) == len(TARGETS) * len(CASES):
        RECORD.write_text("[\n" + ",\n".join(json.dumps({k: row[k] for k in SHOWN}) for row in rows) + "\n]\n")
    different = [] if chosen.record else differences(rows, json.loads(RECORD.read_text()))
    print(*different, sep="\n")
    return int(bad > 0 or bool(different))


def differences(rows: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> list[str]:
    """What the documentation says otherwise, seconds apart."""
    known, new = ([{**{k: row[k] for k in SHOWN}, "seconds": 0} for row in some] for some in (recorded, rows))
    text = "docs/aot.json: {target} {kernel} is not what was compiled now: run bench/aot.py --record"
    return [text.format(**row) for row in new if row not in known]


if __name__ == "__main__":
    sys.exit(main())
