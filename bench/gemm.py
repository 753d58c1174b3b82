"""FP8 1x128 x 128x128 GEMMs on an NVIDIA Hopper GPU: ours against its peers.

    python bench/gemm.py --peers DIR      all shapes: the shipped configuration and some rivals beside all peers

Writes <card>-gemm.{md,json,svg} and <chip>.json, the table that the kernels would ship, into bench/results or --out.
--nk "N,K;N,K", --m "1,16": fewer shapes. --part 0/2: every second weight shape, and of --rule every second
configuration, for two cards at once; gemm_merge.py makes one report of several. --configs FILE: measure these
configurations instead, JSON of {"MxNxK": [name, ...]}; with --only no other shapes. --known REPORT.json: what the same
kernels had checked then is not checked for --rule again. --peers: folder with deep_gemm.tar.xz.

Nothing is timed before it is right: every configuration that is measured first runs ragged shapes, in parallel
processes which also fill the compilers' caches; every peer and every kernel is checked again on each shape that it is
timed on (`kernels/gluon/measure.py` says how). Our GEMM is launched as `linear` launches it: its first weights are
fetched while the kernel before still runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import torch

from blockscale import reference
from blockscale.formats import get_format
from blockscale.kernels.gluon import wide
from blockscale.kernels.gluon.candidates import candidates
from blockscale.kernels.gluon.config import Config, parse
from blockscale.kernels.gluon.gemm import launch
from blockscale.kernels.gluon.launch import release_graph_tickets
from blockscale.kernels.gluon.measure import Call, Case, time_calls
from blockscale.kernels.gluon.selection import by_rule, choose, measured
from blockscale.kernels.gluon.workers import check_all
from blockscale.layouts import convert
from blockscale.platform import detect
from blockscale.registry import Problem, select
from empty_launch import empty_launches
from gemm_peers import PEERS, Peer
from gemm_table import PEER_NAMES, dispatch, markdown, shipped
from roofline import draw
from shapes import NK, RULE_K, RULE_M, RULE_N, UNSEEN, M
from timer import ceilings

START = time.time()
Row = dict[str, Any]


def log(*words: object) -> None:
    print(f"[{time.time() - START:6.1f}s]", *words, flush=True)


def picked(case: Case) -> str:
    """The kernel that the registry picks for this shape."""
    x, w = case.x, case.w
    problem = Problem("matmul", case.n, case.k, x.data.dtype, w.format, w.layout, torch.bfloat16, x_format=x.format,
                      x_layout=x.layout)  # fmt: skip
    return select(problem, detect("cuda"), repack=False).pick(case.m).name


def kernels_version() -> str:
    """A short name of the kernels' source, so that a report can tell which of its rows are another version's."""
    folder = pathlib.Path(wide.__file__).parent
    names = sorted([*folder.glob("wide*.py"), *folder.glob("swap*.py"), folder / "device.py", folder / "config.py"])
    return hashlib.sha256(b"".join(name.read_bytes() for name in names)).hexdigest()[:8]


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
        for (n, k), all_ms in shapes.items()
        for ms in (all_ms[::2], all_ms[1::2])
        if ms
    ]


def warm(peers: list[Peer], n: int, k: int, ms: list[int]) -> None:
    """Worker of `warm_peers`: what DeepGEMM compiles depends on the shape alone."""
    for m in ms:
        x = convert(reference.quantize(torch.zeros(m, k, device="cuda"), get_format("fp8_1x128")), "tma")
        w = reference.quantize(torch.zeros(n, k, device="cuda"), get_format("fp8_128x128"))
        for peer in peers:
            peer.bind(x, w, torch.empty(m, n, device="cuda", dtype=torch.bfloat16))()
        torch.cuda.synchronize()
        del x, w
        torch.cuda.empty_cache()


def prepare(
    texts: list[str],
    peers: list[Peer],
    folder: str,
    shapes: dict[tuple[int, int], list[int]],
    seconds: float,
    workers: int,
) -> dict[str, str]:
    """Compile and check everything in parallel: the verdict on each configuration."""
    end = time.time() + seconds
    warming = warm_peers(peers, folder, shapes)
    verdicts = check_all(texts, seconds, workers)
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


def measure(case: Case, plan: list[Config], peers: list[Peer], unseen: bool) -> Row:
    """One shape's row: our configurations and all peers in one go; the fastest configuration is ours."""
    served = [p for p in peers if p.serves(case.m, case.n, case.k)]
    binds = {p.name: [p.bind(*case.operands(i)) for i in range(case.copies)] for p in served}
    ours = {str(c): bind(case, c) for c in plan}
    times, faults = time_calls(case, {**ours, **binds}, 11 if case.m < 2048 else 15, lambda name: name in ours)
    release_graph_tickets()
    tried = {c: round(t, 3) for c, t in times.items() if c in ours}
    name = picked(case)
    row: Row = {"m": case.m, "n": case.n, "k": case.k, "ours": name, "config": "", "unseen": unseen, "tried": tried,
                "time_us": {p: round(times[p], 3) for p in binds if p in times}, "faults": faults,
                "kernels": kernels_version()}  # fmt: skip
    if tried:
        row["config"] = min(tried, key=tried.__getitem__)
        row["time_us"][name] = tried[row["config"]]
    return row


def plan_of(m: int, n: int, k: int, rivals: int, seen: bool) -> list[Config]:
    """The shipped configuration of a shape and its best rivals; of an unseen shape what the rule gives, alone."""
    sms, chip = sm_count(), detect("cuda").value("chip") or ""
    if not seen:
        return [by_rule(m, n, k, sms)]
    others = [by_rule(m, n, k, sms), *candidates(m, n, k, sms)]
    known = measured(m, n, k, chip) is not None
    return list(dict.fromkeys([choose(m, n, k, sms, chip), *others]))[: rivals + (1 if known else 2)]


def run(args: argparse.Namespace, nks: list[tuple[int, int]], ms: list[int]) -> None:
    """Check and measure everything; write what was measured after each weight shape."""
    chip = detect("cuda").value("chip") or "unknown"
    unseen = [] if args.nk else list(UNSEEN)
    part, parts = map(int, args.part.split("/"))
    nks, unseen = nks[part::parts], unseen[parts - 1 - part :: parts]
    plan = {(m, n, k): plan_of(m, n, k, args.rivals, (n, k) in nks) for n, k in [*unseen, *nks] for m in ms}
    if args.configs:
        asked = json.loads(pathlib.Path(args.configs).read_text())
        named = {at: [parse(t) for t in asked[key]] for at in plan if (key := "x".join(map(str, at))) in asked}
        plan = named if args.only else plan | named
    anywhere = sorted(rule_anywhere() - checked_before(args.known))[part::parts] if args.rule else []
    texts = sorted({str(c) for chosen in plan.values() for c in chosen} | set(anywhere))
    log(len(texts), "configurations,", sum(map(len, plan.values())), "measurements")
    peers = [p for p in PEERS if p.name in PEER_NAMES and p.available(args.peers)]
    shapes = {(n, k): [m for m in ms if (m, n, k) in plan] for n, k in [*nks, *unseen]}
    verdicts = prepare(texts, peers, args.peers, shapes, args.prepare, args.workers)
    bad = {t: v for t, v in verdicts.items() if v}
    log("checked; bad:", json.dumps(bad)[:2000])
    limits = ceilings() | empty_launches()
    out = {"environment": environment(), "kernels": kernels_version(), "bad": bad,
           "checked": sorted(set(texts) - set(bad)), "ceilings": limits, "dispatch": dispatch()}  # fmt: skip
    log(json.dumps(out["ceilings"]), json.dumps(out["dispatch"]))
    rows: list[Row] = []
    for n, k in [*nks, *unseen]:
        for m in shapes[n, k]:
            if time.time() - START > args.budget:
                log("out of time at", m, n, k)
                break
            good = [c for c in plan[m, n, k] if str(c) not in bad]
            began = time.time()
            rows.append(measure(Case(m, n, k), good, peers, (n, k) in unseen))
            log(m, n, k, json.dumps(rows[-1]["time_us"]), f"{time.time() - began:.2f} s")
        save(args.out, chip, out, rows)
        torch.cuda.empty_cache()
    log("end")


def save(folder: pathlib.Path, chip: str, out: dict[str, object], rows: list[Row]) -> None:
    """What was measured so far: the report, its data, a picture, and the table that the kernels would ship."""
    card = chip.split("-")[1] if "-" in chip else chip
    report = {**out, "rows": rows}
    (folder / f"{card}-gemm.json").write_text(json.dumps(report, indent=1))
    (folder / f"{card}-gemm.md").write_text(markdown(report))
    draw(report, folder / f"{card}-gemm.svg")
    (folder / f"{chip}.json").write_text(json.dumps(shipped(rows), indent=1) + "\n")


def checked_before(reports: list[pathlib.Path]) -> set[str]:
    """The configurations that were right in these reports, where they were of the same kernels."""
    found = [json.loads(path.read_text()) for path in reports]
    return {text for report in found if report["kernels"] == kernels_version() for text in report["checked"]}


def rule_anywhere() -> set[str]:
    """What the rule gives over a grid of shapes far wider than the report's: checked, not timed."""
    shapes = [(m, n, k) for n in RULE_N for k in RULE_K for m in RULE_M]
    return {str(by_rule(*at, sm_count(), out_bytes)) for at in shapes for out_bytes in (2, 4)}


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
    parser.add_argument("--configs", default="")
    parser.add_argument("--only", action="store_true", help="no shapes but those that --configs names")
    parser.add_argument("--known", type=pathlib.Path, nargs="*", default=[], help="reports of earlier checks")
    parser.add_argument("--part", default="0/1", help="measure the I-th of P parts of the weight shapes: I/P")
    parser.add_argument("--prepare", type=float, default=130.0, help="seconds for compiling and checking")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds after which no shape is begun")
    parser.add_argument("--rivals", type=int, default=7, help="configurations beside the shipped one")
    parser.add_argument("--rule", action="store_true", help="check all that the rule can give, too")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile and check")
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
