"""FP8 1x128 x 128x128 GEMMs on an NVIDIA Hopper GPU: ours against its peers.

    python bench/gemm.py                  the table of all shapes; writes bench/results/h200-gemm.{md,json,svg}
    python bench/gemm.py --tune           many configurations of every shape; writes tune.json for bench/fit_gemm.py

--out DIR: where results go. --nk "N,K;N,K", --m "1,16": fewer shapes. --peers DIR: folder with deep_gemm.tar.xz.

Nothing is timed before it is right: every configuration that is measured first runs ragged shapes against fp64 rows
of the dequantized operands, into outputs full of NaN, twice with equal bytes; every peer and every kernel is checked
again on each shape that it is timed on. Configurations are compiled and checked by parallel processes, which also fill
the compilers' caches for the timing process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from blockscale import reference
from blockscale.formats import get_format
from blockscale.kernels.gluon import config as configs
from blockscale.kernels.gluon.config import Config, Swap, Wide
from blockscale.kernels.gluon.gemm import launch
from blockscale.kernels.gluon.launch import release_graph_tickets
from blockscale.kernels.gluon.selection import choose
from blockscale.layouts import convert
from blockscale.platform import detect
from blockscale.registry import Problem, select
from blockscale.tensor import BlockScaled
from gemm_peers import PEERS, Peer
from gemm_table import FINAL_PEERS, dispatch, markdown
from shapes import NK, UNSEEN, M
from timer import ceilings, graph, interleaved

WORST_ROW = 6e-3  # relative error of a bf16 row: rounding of the result is 1.7e-3, the rest is wgmma's fp8 sum
ROTATE_BYTES = 256e6  # operands of one graph: several times L2
START = time.time()


def log(*words: object) -> None:
    print(f"[{time.time() - START:6.1f}s]", *words, flush=True)


class Case:
    """Operands of one shape, in as many copies as it takes to leave L2."""

    def __init__(self, m: int, n: int, k: int, seed: int = 0) -> None:
        self.m, self.n, self.k = m, n, k
        random = torch.Generator(device="cuda").manual_seed(seed + m + 7 * n + 31 * k)
        w = _varied(n, k, random) * 0.05
        x = _varied(m, k, random)
        self.w = reference.quantize(w, get_format("fp8_128x128"))
        self.x = convert(reference.quantize(x, get_format("fp8_1x128")), "tma")
        size = n * k + m * k + 2 * m * n
        self.copies = max(1, min(32, math.ceil(ROTATE_BYTES / size)))
        self.ws = [self.w, *(_clone(self.w) for _ in range(self.copies - 1))]
        self.xs = [self.x, *(_clone(self.x) for _ in range(min(self.copies, 4) - 1))]
        self.ys = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in self.xs]
        rows = torch.arange(m, device="cuda")
        if m > 96:
            rows = torch.cat([rows[:4], rows[-4:], torch.randint(0, m, (88,), device="cuda", generator=random)])
        self.rows = rows
        self.want = reference.matmul(_take(self.x, rows), self.w, torch.float64)

    def operands(self, i: int) -> tuple[BlockScaled, BlockScaled, torch.Tensor]:
        return self.xs[i % len(self.xs)], self.ws[i % len(self.ws)], self.ys[i % len(self.ys)]

    def worst_row(self, y: torch.Tensor) -> float:
        """Largest relative error of a row; NaN when anything was left unwritten."""
        if not torch.isfinite(y).all():
            return math.nan
        error = (y[self.rows].double() - self.want).norm(dim=1) / self.want.norm(dim=1)
        return float(error.max())


def _varied(rows: int, cols: int, random: torch.Generator) -> torch.Tensor:
    """Normal numbers whose blocks differ in magnitude, so that a wrong scale shows."""
    x = torch.randn(rows, cols, device="cuda", generator=random)
    level = torch.rand(-(-rows // 128), -(-cols // 128), device="cuda", generator=random) * 1.5 + 0.25
    return x * level.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]


def _clone(t: BlockScaled) -> BlockScaled:
    return replace(t, data=t.data.clone(), scale=t.scale.clone())


def _take(x: BlockScaled, rows: torch.Tensor) -> BlockScaled:
    row = convert(x, "row")
    data = row.data.view(torch.uint8)[rows].view(row.data.dtype)
    return replace(row, data=data, scale=row.scale[rows].contiguous(), shape=(len(rows), row.shape[1]))


def check(run: object, case: Case) -> str:
    """ "" when the result is right, twice the same; else what is wrong."""
    y = case.ys[0]
    outputs = []
    for _ in range(3):
        y.fill_(math.nan)
        got = run()  # type: ignore[operator]
        torch.cuda.synchronize()
        outputs.append((y if got is None else got).clone())
    error = case.worst_row(outputs[0])
    if not error < WORST_ROW:
        return f"worst row {error:.2e}"
    return "" if all(torch.equal(outputs[0], other) for other in outputs) else "runs differ"


def check_replay(captured: torch.cuda.CUDAGraph, case: Case) -> str:
    """Replayed back to back, launches overlap (programmatic dependent launch): every output must still be right."""
    for y in case.ys:
        y.fill_(math.nan)
    captured.replay()
    captured.replay()
    torch.cuda.synchronize()
    wrong = [error for y in case.ys if not (error := case.worst_row(y)) < WORST_ROW]
    return f"replay: worst row {wrong[0]:.2e}" if wrong else ""


def picked(case: Case) -> str:
    """The kernel that the registry picks for this shape."""
    x, w = case.x, case.w
    problem = Problem("matmul", case.n, case.k, x.data.dtype, w.format, w.layout, torch.bfloat16, x_format=x.format,
                      x_layout=x.layout)  # fmt: skip
    return select(problem, detect("cuda"), repack=False).pick(case.m).name


def sm_count() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


# -- configurations: compiled and checked by parallel processes --------------------------------------------------


def ragged_shapes(config: Config) -> Iterator[tuple[int, int, int]]:
    if isinstance(config, Wide):
        yield from ((333, 2112, 1024), (130, 576, 720), (200, 192, 2048), (1000, 2112, 3584))
    else:
        t = config.tokens
        yield from ((t, 2112, 1024), (t // 2 + 1, 576, 720), (t + 1, 192, 2048), (1, 4096, 7168), (t, 7168, 4096))


def check_configs(texts: Iterable[str], tiny: bool) -> None:
    """Worker: one line of JSON for each configuration, "" for right."""
    cases: dict[tuple[int, int, int], Case] = {}
    for text in texts:
        config = configs.parse(text)
        verdict = ""
        for shape in [(9, 192, 512)] if tiny else ragged_shapes(config):
            blocks = -(-shape[2] // 128)
            if blocks % config.step or (isinstance(config, Swap) and config.split > blocks // config.step):
                continue
            if shape not in cases:
                cases[shape] = Case(*shape)
            case = cases[shape]
            x, w, y = case.operands(0)
            try:
                wrong = check(launch(x, w, None, y, config, sm_count()).run, case)
            except Exception as e:  # a configuration that does not compile is a finding, not a crash
                wrong = f"{type(e).__name__} {str(e)[:200]}"
            if wrong:
                verdict = f"{shape}: {wrong}"
                break
        print("CHECK", json.dumps([text, verdict]), flush=True)


def prepare(texts: list[str], peers: list[str], nks: list[tuple[int, int]], ms: list[int], args: argparse.Namespace,
            seconds: float) -> tuple[dict[str, str], list[str]]:  # fmt: skip
    """Compile and check everything in parallel: (verdict of each configuration, log lines of the peers)."""
    me = [sys.executable, __file__, "--peers", args.peers]
    workers = max(1, min(10, len(texts)))
    jobs = [[*me, "--check", ",".join(texts[i::workers])] for i in range(workers)]
    if "deepgemm" in peers:
        jobs += [[*me, "--warm", "deepgemm", "--nk", f"{n},{k}", "--m", ",".join(map(str, ms))] for n, k in nks]
    jobs += extra_jobs(me)
    running = [
        (
            job,
            subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True),
        )
        for job in jobs
    ]
    end = time.time() + seconds
    verdicts, lines = dict.fromkeys(texts, "not reached"), []
    for job, process in running:
        try:
            output = process.communicate(timeout=max(1.0, end - time.time()))[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0] + f"\nTIMEOUT {job[:3]} {job[-2:]}"
        if job[-1] == "--json":
            (args.out / "conformance.json").write_text(output)
        if "compute-sanitizer" in job[0]:
            (args.out / f"{job[2]}.txt").write_text(output)
        for line in output.splitlines():
            if line.startswith("CHECK ") and "compute-sanitizer" not in job[0]:
                text, verdict = json.loads(line[6:])
                verdicts[text] = verdict
        if process.returncode:
            lines.append(output[-400:])
    return verdicts, lines


def extra_jobs(me: list[str]) -> list[list[str]]:
    """Conformance of the Hopper kernels, and compute-sanitizer over small shapes, where it is installed."""
    jobs = [[sys.executable, "-m", "blockscale", "conformance", "--kernel", "gluon", "--device", "cuda", "--json"]]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if pathlib.Path(sanitizer).exists():
        small = [
            *me,
            "--tiny",
            "--check",
            "wide-64o-u8-p2-g2-s1-x1-y64,swap-16-g1-k2-x1-s1,swap-32-g2-k2-x1-s2,wide-256t-u2-p1-g2-s1-x1-y64",
        ]
        jobs += [[sanitizer, "--tool", tool, *small] for tool in ("memcheck", "racecheck")]
    return jobs


def warm(peers: list[Peer], nks: list[tuple[int, int]], ms: list[int]) -> None:
    """Worker: let peers compile what they compile for these shapes."""
    for n, k in nks:
        for m in ms:
            case = Case(m, n, k)
            for peer in peers:
                peer.bind(*case.operands(0))()
                torch.cuda.synchronize()


# -- timing ------------------------------------------------------------------------------------------------------


def time_case(
    case: Case, chosen: list[Config], peers: list[Peer], rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """(microseconds, faults) by name: the text of a configuration or the name of a peer."""
    calls: dict[str, list[object]] = {}
    faults: dict[str, str] = {}
    copies = range(case.copies)
    for config in chosen:

        def bound(i: int, config: Config = config) -> object:
            x, w, y = case.operands(i)
            return lambda: launch(x, w, None, y, config, sm_count()).run()

        calls[str(config)] = [bound(i) for i in copies]
    for peer in peers:
        if peer.serves(case.m, case.n, case.k):
            try:
                calls[peer.name] = [peer.bind(*case.operands(i)) for i in copies]
            except Exception as e:
                faults[peer.name] = f"{type(e).__name__} {str(e)[:200]}"
    graphs = {}
    floor = case.n * case.k / 4.2e6 + 2.0 * case.m * case.n * case.k / 1.3e9  # microseconds, for the count only
    count = max(case.copies, min(24, math.ceil(300 / floor)))
    for name, bound_calls in calls.items():
        try:
            wrong = check(bound_calls[0], case)
            if wrong:
                faults[name] = wrong
                continue
            captured = graph(bound_calls, count)  # type: ignore[arg-type]
            wrong = check_replay(captured, case) if name in map(str, chosen) else ""
            if wrong:
                faults[name] = wrong
            else:
                graphs[name] = captured
        except Exception as e:
            faults[name] = f"{type(e).__name__} {str(e)[:200]}"
    times = interleaved(graphs, count, rounds)
    graphs.clear()
    release_graph_tickets()
    return times, faults


def to_tune(m: int, n: int, k: int) -> list[Config]:
    """Configurations worth measuring: everything that fills the GPU without an absurd number of parts."""
    blocks, sms = -(-k // 128), sm_count()
    steps = [s for s in (1, 2, 4) if blocks % s == 0]
    found: list[Config] = []
    if m <= 64:
        tokens = max(8, 1 << (m - 1).bit_length())
        tiles = -(-n // 64)
        for split in (1, 2, 3, 4, 8):
            programs = tiles * split
            if (split > 1 and (programs > 2.1 * sms or split > blocks // 3)) or (programs < 0.4 * sms and split < 8):
                continue
            for groups, step in ((1, 1), (1, 2), (2, 2)):
                if step not in steps or (split > 2 and groups == 2):
                    continue
                most = {1: 4, 2: 2}[groups] if tokens <= 32 else {1: 3, 2: 1}[groups]
                per_sm = min(-(-programs // sms), most)
                found.append(Swap(tokens, groups, split, per_sm, step))
                if per_sm > 1 and split == 1:
                    found.append(Swap(tokens, groups, split, per_sm, step, pdl=False))
        if 2 in steps and tiles > sms:
            found.append(Swap(tokens, 1, 0, 1, 2))
    if m >= 64:
        unroll = 8 if blocks >= 8 else 4
        shapes = [(64, unroll, 2, 1), (128, unroll, 2, 1), (128, unroll, 2, 2), (128, unroll, 3, 1),
                  (192, 4, 2, 1)]  # fmt: skip
        shapes += [(32, unroll, 2, 1)] if m == 128 else []
        shapes += [(128, unroll, 3, 2), (256, 2, 2, 1)] if m >= 512 else []
        for bn, u, groups, step in shapes:
            if step not in steps:
                continue
            grids = set()
            for parts in (1, 2, 3) if m >= 128 else (1,):
                config = Wide(
                    bn, u, parts, groups, step, way="t" if groups == 3 or bn == 256 else "r" if bn == 192 else "o"
                )
                grid = configs.wide_grid(config, m, n, k, sms)
                if parts > 1 and (not grid.cut_tiles or grid in grids or (m >= 2048 and parts == 2)):
                    continue
                if config.tiles(m, n) > 3 * sms and bn <= 64:
                    continue
                grids.add(grid)
                found.append(replace(config, pdl=m < 2048))
                if parts == 1 and bn >= 128 and m in (512, 4096):
                    found.append(replace(config, pdl=m >= 2048))
    return list(dict.fromkeys(found))


def tune(args: argparse.Namespace, nks: list[tuple[int, int]], ms: list[int]) -> None:
    """Measure candidates, take the best of each shape, and time that once more beside all peers."""
    unseen = [] if args.nk else list(UNSEEN)
    plan = {(m, n, k): to_tune(m, n, k) for n, k in nks for m in ms}
    plan |= {(m, n, k): [choose(m, n, k, sm_count())] for n, k in unseen for m in ms}
    texts = sorted({str(c) for chosen in plan.values() for c in chosen})
    texts.sort(key=lambda t: hash(t) % 97)  # spread slow compilations over the workers
    log(len(texts), "configurations to compile and check")
    peers = [p for p in PEERS if p.name in FINAL_PEERS and p.available(args.peers)]
    verdicts, lines = prepare(texts, [p.name for p in peers], [*nks, *unseen], ms, args, args.prepare)
    bad = {t: v for t, v in verdicts.items() if v}
    log("checked; bad:", json.dumps(bad)[:3000], *[line[:300] for line in lines])
    out = {"environment": environment(), "bad": bad, "checked": sorted(set(texts) - set(bad)), "ceilings": ceilings()}
    try:
        out["dispatch"] = dispatch()
    except Exception as e:
        out["dispatch"] = {"failed": f"{type(e).__name__} {str(e)[:200]}"}
    log("dispatch", json.dumps(out["dispatch"]))
    tuned: list[dict] = []
    rows: list[dict] = []
    try:
        for n, k in [*nks, *unseen]:
            for m in ms:
                if time.time() - START < args.budget:
                    measure(Case(m, n, k), plan[m, n, k], bad, peers, tuned, rows, (n, k) in unseen)
            save(args.out, out, tuned, rows)
            torch.cuda.empty_cache()
    except Exception as e:  # a dead CUDA context: keep what was measured
        log(f"STOPPED after {len(rows)} shapes: {type(e).__name__} {str(e)[:300]}")
    save(args.out, out, tuned, rows)
    text = markdown({**out, "rows": rows})
    (args.out / "h200-gemm.md").write_text(text)
    print(text[:7000])
    log("end")


def measure(
    case: Case, plan: list[Config], bad: dict[str, str], peers: list[Peer], tuned: list[dict], rows: list[dict],
    unseen: bool,
) -> None:  # fmt: skip
    """Append one shape's candidates to `tuned` and its row to `rows`."""
    shape = {"m": case.m, "n": case.n, "k": case.k}
    chosen = [c for c in plan if str(c) not in bad]
    faults: dict[str, str] = {}
    if len(chosen) > 1:
        first = [p for p in peers if p.name == "deepgemm"]
        times, faults = time_case(case, chosen, first, rounds=7 if case.m < 2048 else 5)
        tuned.append({**shape, "time_us": {a: round(b, 3) for a, b in times.items()}})
        ours = {c: t for c, t in times.items() if c not in FINAL_PEERS}
        chosen = [configs.parse(min(ours, key=ours.__getitem__))] if ours else []
    times, more = time_case(case, chosen, peers, rounds=13 if case.m < 2048 else 7)
    name, config = picked(case), str(chosen[0]) if chosen else ""
    if config in times:
        times[name] = times.pop(config)
    rows.append({**shape, "time_us": {a: round(b, 3) for a, b in times.items()}, "ours": name, "config": config,
                 "unseen": unseen, "faults": {**faults, **more}})  # fmt: skip


def save(folder: pathlib.Path, out: dict, tuned: list[dict], rows: list[dict]) -> None:
    """What was measured so far: the report's data, all candidates, and the table for the kernels."""
    (folder / "h200-gemm.json").write_text(json.dumps({**out, "rows": rows}, indent=1))
    (folder / "tune.json").write_text(json.dumps({"environment": out["environment"], "rows": tuned}))
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["config"] and not row["unseen"]:
            table.setdefault(f"{row['n']}x{row['k']}", {})[str(row["m"])] = row["config"]
    (folder / "h200.json").write_text(json.dumps(table, indent=1) + "\n")


def environment() -> dict[str, str]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "sms": str(properties.multi_processor_count),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--peers", default=".peers")
    parser.add_argument("--nk", default="")
    parser.add_argument("--m", default="")
    parser.add_argument("--prepare", type=float, default=130.0, help="seconds for compiling and checking")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds after which no shape is begun")
    parser.add_argument("--check", default="", help="worker: configurations to check")
    parser.add_argument("--tiny", action="store_true", help="worker: one small shape, for compute-sanitizer")
    parser.add_argument("--warm", default="", help="worker: peer to warm up")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    nks = [tuple(map(int, nk.split(","))) for nk in args.nk.split(";")] if args.nk else list(NK)
    ms = [int(m) for m in args.m.split(",")] if args.m else list(M)
    if args.check:
        check_configs(args.check.split(","), args.tiny)
    elif args.warm:
        warm([p for p in PEERS if p.name.startswith(args.warm) and p.available(args.peers)], nks, ms)  # type: ignore[arg-type]
    elif args.tune:
        tune(args, nks, ms)  # type: ignore[arg-type]
    else:
        parser.error("say --tune: the table of the shapes comes with it")


if __name__ == "__main__":
    main()
