"""FP8 1x128 x 128x128 GEMMs on an NVIDIA Hopper GPU: ours against its peers.

    python bench/gemm.py                  candidates of all shapes, then the best of each beside all peers

Writes results/<card>-gemm.{md,json,svg}, tune.json (all candidates) and <chip>.json (the table that the kernels ship).
--out DIR: where. --nk "N,K;N,K", --m "1,16": fewer shapes. --peers DIR: folder with deep_gemm.tar.xz.

Nothing is timed before it is right: every configuration that is measured first runs ragged shapes, in parallel
processes which also fill the compilers' caches; every peer and every kernel is checked again on each shape that it is
timed on (`kernels/gluon/measure.py` says how). Our GEMM is launched as `linear` launches it: its first weights are
fetched while the kernel before still runs; "late" is the same kernel without that.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import torch
from roofline import draw

from blockscale.kernels.gluon import config as configs
from blockscale.kernels.gluon.candidates import candidates
from blockscale.kernels.gluon.config import Config
from blockscale.kernels.gluon.gemm import launch
from blockscale.kernels.gluon.launch import release_graph_tickets
from blockscale.kernels.gluon.measure import Call, Case, time_calls
from blockscale.kernels.gluon.selection import choose
from blockscale.kernels.gluon.workers import check_all
from blockscale.platform import detect
from blockscale.registry import Problem, select
from gemm_peers import PEERS, Peer
from gemm_table import FINAL_PEERS, dispatch, markdown
from shapes import NK, UNSEEN, M
from timer import ceilings

START = time.time()
Row = dict[str, object]


def log(*words: object) -> None:
    print(f"[{time.time() - START:6.1f}s]", *words, flush=True)


def picked(case: Case) -> str:
    """The kernel that the registry picks for this shape."""
    x, w = case.x, case.w
    problem = Problem("matmul", case.n, case.k, x.data.dtype, w.format, w.layout, torch.bfloat16, x_format=x.format,
                      x_layout=x.layout)  # fmt: skip
    return select(problem, detect("cuda"), repack=False).pick(case.m).name


def sm_count() -> int:
    return int(detect("cuda").value("sms") or 0)


def warm_peers(peers: list[Peer], folder: str, shapes: dict[tuple[int, int], list[int]]) -> list[subprocess.Popen[str]]:
    """Processes that let DeepGEMM compile what it compiles for these shapes."""
    if not any(p.name == "deepgemm" for p in peers):
        return []
    return [
        subprocess.Popen(
            [sys.executable, __file__, "--peers", folder, "--warm", f"{n},{k}", "--m", ",".join(map(str, ms))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for (n, k), ms in shapes.items()
    ]


def warm(peers: list[Peer], n: int, k: int, ms: list[int]) -> None:
    """Worker of `warm_peers`."""
    for m in ms:
        case = Case(m, n, k)
        for peer in peers:
            peer.bind(*case.operands(0))()
            torch.cuda.synchronize()


def prepare(
    texts: list[str], peers: list[Peer], folder: str, shapes: dict[tuple[int, int], list[int]], seconds: float
) -> dict[str, str]:
    """Compile and check everything in parallel: the verdict on each configuration."""
    end = time.time() + seconds
    warming = warm_peers(peers, folder, shapes)
    verdicts = check_all(texts, seconds, workers=12)
    for process in warming:
        try:
            process.wait(max(0.1, end - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return verdicts


def bind(case: Case, config: Config, early: bool = True) -> list[Call]:
    """Our launches, one for each copy of the operands."""

    def one(i: int) -> Call:
        x, w, y = case.operands(i)
        return lambda: launch(x, w, None, y, config, sm_count(), early=early).run()

    return [one(i) for i in range(case.copies)]


def measure(case: Case, plan: list[Config], peers: list[Peer], unseen: bool) -> tuple[Row, Row]:
    """One shape: (times of its candidates, its row of the report)."""
    shape = {"m": case.m, "n": case.n, "k": case.k}
    binds = {
        p.name: [p.bind(*case.operands(i)) for i in range(case.copies)] for p in peers if p.serves(*shape.values())
    }
    tuned: Row = {}
    faults: dict[str, str] = {}
    if len(plan) > 1:
        calls = {str(c): bind(case, c) for c in plan}
        times, faults = time_calls(case, {**calls, "deepgemm": binds["deepgemm"]} if "deepgemm" in binds else calls,
                                   7 if case.m < 2048 else 5, lambda name: name != "deepgemm")  # fmt: skip
        tuned = {**shape, "time_us": {a: round(b, 3) for a, b in times.items()}}
        ours = {c: t for c, t in times.items() if c not in binds}
        plan = [configs.parse(min(ours, key=ours.__getitem__))] if ours else []
    name, config = picked(case), plan[0] if plan else None
    final: dict[str, list[Call]] = dict(binds)
    if config is not None:
        final[name] = bind(case, config)
        if config.pdl:
            final["late"] = bind(case, config, early=False)
    times, more = time_calls(case, final, 13 if case.m < 2048 else 7, lambda n: n not in binds)
    release_graph_tickets()
    row: Row = {**shape, "time_us": {a: round(b, 3) for a, b in times.items()}, "ours": name,
                "config": "" if config is None else str(config), "unseen": unseen,
                "faults": {**faults, **more}}  # fmt: skip
    return tuned, row


def run(args: argparse.Namespace, nks: list[tuple[int, int]], ms: list[int]) -> None:
    """Measure candidates, take the best of each shape, and time that once more beside all peers."""
    unseen = [] if args.nk else list(UNSEEN)
    sms = sm_count()
    chip = detect("cuda").value("chip") or "unknown"
    plan = {(m, n, k): candidates(m, n, k, sms) for n, k in nks for m in ms}
    plan |= {(m, n, k): [choose(m, n, k, sms)] for n, k in unseen for m in ms}
    texts = sorted({str(c) for chosen in plan.values() for c in chosen})
    log(len(texts), "configurations,", sum(map(len, plan.values())), "measurements")
    peers = [p for p in PEERS if p.name in FINAL_PEERS and p.available(args.peers)]
    verdicts = prepare(texts, peers, args.peers, dict.fromkeys([*nks, *unseen], ms), args.prepare)
    bad = {t: v for t, v in verdicts.items() if v}
    log("checked; bad:", json.dumps(bad)[:2000])
    out = {"environment": environment(), "bad": bad, "checked": sorted(set(texts) - set(bad)), "ceilings": ceilings(),
           "dispatch": dispatch()}  # fmt: skip
    log(json.dumps(out["ceilings"]), json.dumps(out["dispatch"]))
    tuned: list[Row] = []
    rows: list[Row] = []
    for n, k in [*nks, *unseen]:
        for m in ms:
            if time.time() - START > args.budget:
                log("out of time at", m, n, k)
                break
            good = [c for c in plan[m, n, k] if str(c) not in bad]
            more, row = measure(Case(m, n, k), good, peers, (n, k) in unseen)
            tuned += [more] if more else []
            rows.append(row)
        save(args.out, chip, out, tuned, rows)
        torch.cuda.empty_cache()
    log("end")


def save(folder: pathlib.Path, chip: str, out: dict[str, object], tuned: list[Row], rows: list[Row]) -> None:
    """What was measured so far: the report, its data, all candidates, and the table for the kernels."""
    card = chip.split("-")[1]
    report = {**out, "rows": rows}
    (folder / f"{card}-gemm.json").write_text(json.dumps(report, indent=1))
    (folder / f"{card}-gemm.md").write_text(markdown(report))
    (folder / "tune.json").write_text(json.dumps({"environment": out["environment"], "rows": tuned}))
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["config"] and not row["unseen"]:
            table.setdefault(f"{row['n']}x{row['k']}", {})[str(row["m"])] = str(row["config"])
    (folder / f"{chip}.json").write_text(json.dumps(table, indent=1) + "\n")
    draw(report, folder / f"{card}-gemm.svg")


def environment() -> dict[str, str]:
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "sms": str(sm_count()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--peers", default=".peers")
    parser.add_argument("--nk", default="")
    parser.add_argument("--m", default="")
    parser.add_argument("--prepare", type=float, default=130.0, help="seconds for compiling and checking")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds after which no shape is begun")
    parser.add_argument("--warm", default="", help="worker: N,K that DeepGEMM compiles for")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    nks = [tuple(map(int, nk.split(","))) for nk in args.nk.split(";")] if args.nk else list(NK)
    ms = [int(m) for m in args.m.split(",")] if args.m else list(M)
    if args.warm:
        n, k = map(int, args.warm.split(","))
        warm([p for p in PEERS if p.name == "deepgemm" and p.available(args.peers)], n, k, ms)
    else:
        run(args, nks, ms)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
