"""Portable Triton kernels on a CUDA device: right first, then timed beside their peers in one run.

    python bench/triton_bench.py --out DIR [--quick] [--section NAME]… [--sweep]

1. Correctness, spread over processes: every conformance case that a `triton.*` kernel accepts, native casts against
   the codec and the reference, CUDA graphs, torch.compile, determinism. `--quick` keeps to the small cases.
2. Times: CUDA graphs over operands that together exceed the L2 cache, rounds of all competitors interleaved, medians.
   A kernel whose result is wrong is reported and not timed. DeepGEMM is an optional peer: importable or absent.

(Not named triton.py: a script's folder leads the import path, and the kernels import triton.)
Writes DIR/triton.json and prints one table. Times are microseconds a call; ratios are peer time / own time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blockscale import reference
from blockscale.formats import get_format
from blockscale.kernels.triton import capability, gemm, grouped
from blockscale.kernels.triton import quantize as q
from blockscale.platform import detect
from blockscale.tensor import BlockScaled
from blockscale.tuning import GemmTile, QuantizeTile, gemm_tile
from triton_checks import run_checks

L2_BYTES = 200 << 20
SHAPES = ((2112, 7168), (24576, 1536), (7168, 16384), (7168, 2048), (4096, 7168))
"""(N, K) of DeepSeek-V3's linears."""
Calls = dict[str, Callable[[int], Any]]
"""Competitors: name -> call on operand set i."""


class Group:
    """Competitors on the same operands. check(name) -> error; sets: how many operand sets rotate."""

    def __init__(self, name: str, sets: int, calls: Calls, check: Callable[[str, Any], float] | None = None) -> None:
        self.name, self.sets, self.calls, self.check = name, sets, calls, check


def deep_gemm() -> Any | None:
    try:
        import deep_gemm as module
    except Exception as e:
        print(f"DeepGEMM: not a peer in this run ({type(e).__name__}: {str(e)[:80]})")
        return None
    return module


def weights(n: int, k: int, sets: int, experts: int = 0, fmt: str = "fp8_128x128") -> list[BlockScaled]:
    """Random codes and scales; made on the device, so any number is quick."""
    f, lead = get_format(fmt), (experts,) if experts else ()
    made = []
    for _ in range(sets):
        if f.packed:
            data = torch.randint(0, 256, (*lead, *f.data_shape(n, k)), device="cuda", dtype=torch.uint8)
        else:
            data = torch.randn(*lead, n, k, device="cuda").clamp(-4, 4).to(f.element.dtype)
        if f.scale_dtype == torch.float32:
            scale = torch.rand(*lead, *f.scale_shape(n, k), device="cuda") * 1e-2 + 1e-3
        else:
            codes = torch.randint(118, 124, (*lead, *f.scale_shape(n, k)), device="cuda", dtype=torch.uint8)
            scale = codes.view(f.scale_dtype)
        level = torch.ones(lead, device="cuda") if f.two_level else None
        made.append(BlockScaled.trusted(data, scale, f, "row", (*lead, n, k), level))
    return made


def activations(m: int, k: int, sets: int) -> list[BlockScaled]:
    p = detect("cuda")
    xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    return [q.quantize(x, get_format("fp8_1x128"), p, layout="tma") for x in xs]


def as_values(x: BlockScaled) -> BlockScaled:
    """Codes as fp16, which is how `linear` hands them over where there is no fp8 instruction."""
    return replace(x, data=x.data.to(torch.float16))


def row_error(x: BlockScaled | torch.Tensor, w: BlockScaled) -> Callable[[Any], float]:
    """Worst relative error of eight rows against fp64; infinite where the result is not finite."""
    rows = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], 8)).long().cuda()
    values = (reference.dequantize(x) if isinstance(x, BlockScaled) else x)[rows].double()
    want = values @ reference.dequantize(w).double().T

    def check(y: Any) -> float:
        if not torch.isfinite(y).all():
            return float("inf")
        return float(((y[rows].double() - want).norm(dim=1) / want.norm(dim=1)).max())

    return check


def gemm_groups(quick: bool, sweep: bool) -> Iterator[Group]:
    """Multiplication of quantized operands: native, codec, bf16, DeepGEMM."""
    p, peer = detect("cuda"), deep_gemm()
    for n, k in SHAPES[-1:] if quick else SHAPES[1::3] + SHAPES[2:3] if sweep else SHAPES:
        for m in (1, 512, 4096) if sweep else (1, 16, 64, 512, 4096):
            sets = max(2, min(48, -(-L2_BYTES // (n * k + m * k + 2 * m * n))))
            ws, xs = weights(n, k, sets), activations(m, k, sets)
            held = [as_values(x) for x in xs]
            dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, sets // 2))]
            xb = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            tickets = torch.zeros(1 << 16, device="cuda", dtype=torch.int32)
            calls: Calls = {
                "native": lambda i, xs=xs, ws=ws, t=tickets: gemm.matmul(xs[i], ws[i], p, tickets=t),
                "codec": lambda i, xs=held, ws=ws, t=tickets: gemm.matmul(xs[i], ws[i], p, tickets=t, native=False),
                "bf16": lambda i, xb=xb, d=dense: torch.matmul(xb, d[i % len(d)].T),
            }
            if m <= 64:
                calls["weight_only"] = lambda i, xb=xb, ws=ws, t=tickets: gemm.matmul(xb, ws[i], p, tickets=t)
            if peer:
                out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
                views = [x.scale.mT[:m] for x in xs]
                calls["deep_gemm"] = lambda i, xs=xs, ws=ws, v=views, o=out: (
                    peer.fp8_gemm_nt((xs[i].data, v[i]), (ws[i].data, ws[i].scale), o, disable_ue8m0_cast=True), o,
                )[1]  # fmt: skip
            if sweep:
                calls |= {f"sweep {name}": call for name, call in candidates(m, n, k, xs, held, ws, tickets)}
            own = row_error(xs[0], ws[0])
            by = {"bf16": lambda y: 0.0, "weight_only": row_error(xb, ws[0])}
            check = lambda name, y, own=own, by=by: by.get(name, own)(y)  # noqa: E731
            yield Group(f"gemm {m}x{n}x{k}", sets, calls, check)


def candidates(m: int, n: int, k: int, xs: Any, held: Any, ws: Any, tickets: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """Tiles that tuning might take, by the path that they serve."""
    p = detect("cuda")
    tma = gemm_tile("tma", m, n, k, 128, p)
    codec = gemm_tile("codec", m, n, k, 128, capability.without_fp8(p))
    tries: list[tuple[bool, GemmTile]] = []
    if m > 64:
        for bm, bn, warps, stages, programs, registers in (
            (128, 128, 8, 4, 1, 0), (128, 64, 4, 4, 2, 0), (128, 64, 4, 3, 3, 168), (64, 128, 4, 4, 2, 0),
        ):  # fmt: skip
            how = {"registers": registers, "programs": programs, "warps": warps, "stages": stages}
            tries.append((True, replace(tma, bm=bm, bn=bn, **how)))
        for bm, bn, bk, warps, stages in (
            (128, 128, 128, 8, 3), (128, 64, 128, 4, 2), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 4),
        ):  # fmt: skip
            tries.append((False, replace(codec, bm=bm, bn=bn, bk=bk, warps=warps, stages=stages)))
    else:
        for split in (1, 2, 4, 8):
            for bn, bk, warps, stages in (
                (64, 128, 4, 4),
                (64, 128, 4, 6),
                (32, 128, 4, 4),
                (128, 128, 4, 4),
                (64, 256, 4, 3),
            ):
                if split * 4 <= k // 128:
                    tries.append(
                        (False, replace(codec, bn=bn, bk=min(bk, 128), warps=warps, stages=stages, split=split))
                    )
    for native, tile in tries:
        name = f"{'tma' if native else 'codec'} {tile.bm}x{tile.bn}x{tile.bk} w{tile.warps} s{tile.stages} "
        name += f"p{tile.programs} r{tile.registers} split{tile.split}{' swap' * tile.swap}"

        def call(i: int, native: bool = native, tile: GemmTile = tile) -> torch.Tensor:
            return gemm.matmul((xs if native else held)[i], ws[i], p, native=native, tile=tile, tickets=tickets)

        yield name, call


def grouped_groups(quick: bool, sweep: bool) -> Iterator[Group]:
    """Experts: 32 of them, 8192 rows, and a decode batch."""
    p, peer = detect("cuda"), deep_gemm()
    for n, k, t in ((4096, 7168, 8192), (7168, 2048, 8192), (4096, 7168, 64))[2 * sweep :]:
        experts, sets = 32, 2
        ids = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(t // experts)
        offsets = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (t // experts)
        xs = activations(t, k, sets)
        for fmt in ("fp8_128x128", "mxfp4"):
            ws = weights(n, k, sets, experts, fmt)
            calls: Calls = {"native": lambda i, xs=xs, ws=ws, o=offsets: grouped.grouped_matmul(xs[i], ws[i], o, p)}
            if fmt == "fp8_128x128" and t >= 4096:
                calls["codec"] = lambda i, xs=xs, ws=ws, o=offsets: grouped.grouped_matmul(
                    xs[i], ws[i], o, p, native=False
                )
            if peer and fmt == "fp8_128x128" and t >= 4096:
                out = torch.empty(t, n, device="cuda", dtype=torch.bfloat16)
                calls["deep_gemm"] = lambda i, xs=xs, ws=ws, o=out, e=ids: (
                    peer.m_grouped_fp8_gemm_nt_contiguous(
                        (xs[i].data, xs[i].scale.mT[: o.shape[0]]), (ws[i].data, ws[i].scale), o, e,
                        disable_ue8m0_cast=True,
                    ), o,
                )[1]  # fmt: skip
            first = row_error(_rows(xs[0], t // experts), ws[0][0])
            check = lambda name, y, first=first, rows=t // experts: first(y[:rows])  # noqa: E731
            yield Group(f"grouped {fmt} E={experts} {t}x{n}x{k}", sets, calls, check)


def _rows(x: BlockScaled, rows: int) -> BlockScaled:
    dense = replace(x, scale=x.scale[:, :rows].contiguous(), data=x.data[:rows], shape=(rows, x.shape[1]))
    return replace(dense, layout="col_scales")


def quantize_groups(quick: bool, sweep: bool) -> Iterator[Group]:
    """Group quantization against a copy of the same input, and one row against an empty kernel."""
    from triton_checks import empty_kernel

    p, fmt, ue = detect("cuda"), get_format("fp8_1x128"), get_format("fp8_1x128_ue8m0")
    for m, k in ((8192, 7168), (1, 7168)) if sweep else ((8192, 7168), (1, 7168), (8192, 2048)):
        sets = 3 if m > 1 else 8
        xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
        out = torch.empty_like(xs[0])
        wide = [torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
        weight = torch.rand(k, device="cuda", dtype=torch.bfloat16)
        ticket = torch.zeros(1, device="cuda", dtype=torch.int32)
        tiles = (
            ((1, 1, 1), (1, 4, 1), (1, 2, 2), (1, 8, 4), (1, 4, 4))
            if m == 1
            else (
                (8, 4, 4),
                (16, 4, 4),
                (4, 16, 8),
                (8, 8, 8),
                (8, 8, 4),
                (2, 16, 4),
                (4, 4, 4),
                (8, 2, 2),
                (2, 32, 8),
                (4, 8, 2),
            )
        )
        calls: Calls = {
            f"sweep {layout} {t}": lambda i, xs=xs, t=t, layout=layout: q.quantize(
                xs[i], fmt, p, layout=layout, tile=QuantizeTile(*t, "sweep"))
            for layout in ("row", "tma") for t in tiles
        } if sweep else {}  # fmt: skip
        yield Group(f"quantize {m}x{k}", sets, calls | {
            "row": lambda i, xs=xs: q.quantize(xs[i], fmt, p),
            "tma": lambda i, xs=xs: q.quantize(xs[i], fmt, p, layout="tma"),
            "ue8m0x4": lambda i, xs=xs: q.quantize(xs[i], ue, p, layout="ue8m0x4"),
            "codec": lambda i, xs=xs: q.quantize(xs[i], fmt, capability.without_fp8(p), layout="tma"),
            "swiglu": lambda i, w=wide: q.swiglu_quantize(w[i], fmt, p, layout="tma"),
            "rmsnorm": lambda i, xs=xs, w=weight: q.rmsnorm_quantize(xs[i], w, 1e-6, fmt, p, layout="tma"),
            "copy": lambda i, xs=xs, o=out: o.copy_(xs[i]),
            "empty": lambda i, t=ticket: empty_kernel[(1,)](t),
        })  # fmt: skip


SECTIONS = {"quantize": quantize_groups, "gemm": gemm_groups, "grouped": grouped_groups}


def time_group(group: Group, rounds: int = 9, target_us: float = 1000.0) -> dict[str, Any]:
    """{name: median microseconds a call, or the reason why it was not timed}."""
    out: dict[str, Any] = {}
    graphs: dict[str, tuple[Any, int]] = {}
    for name, call in group.calls.items():
        try:
            poison = torch.full_like(call(0), float("nan")) if group.check else None
            del poison  # the allocator gives the next result the same memory
            y = call(0)
            error = group.check(name, y) if group.check else 0.0
            if not error < 6e-3:
                out[name] = f"wrong: worst row error {error:.2g}"
                continue
            once = _estimate(group, call)
            count = max(group.sets, min(400, int(target_us / once)))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(count):
                    call(i % group.sets)
            graphs[name] = graph, count
        except Exception as e:
            out[name] = f"{type(e).__name__}: {str(e)[:160]}"
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / count)
    return {**out, **{name: statistics.median(t[1:]) for name, t in times.items()}}


def _estimate(group: Group, call: Callable[[int], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call(0)
    start.record()
    for i in range(3):
        call(i % group.sets)
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) * 1e3 / 3, 2.0)


MOVED = {"swiglu": 5, "rmsnorm": 3, "copy": 4}
"""Bytes an element that a quantization reads and writes; 3 where not said: bf16 in, a byte out."""


def table(records: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each group; sweeps as their best few."""
    lines = []
    for name, times in records.items():
        good = {k: v for k, v in times.items() if isinstance(v, float) and not k.startswith("sweep")}
        swept = sorted((v, k[6:]) for k, v in times.items() if isinstance(v, float) and k.startswith("sweep"))
        if name.startswith("quantize"):
            copy = good["copy"] / MOVED["copy"]
            rate = {
                n: f" ({copy * MOVED.get(n, 3) / us:.2f} of copy)" if n != "empty" else "" for n, us in good.items()
            }
            cells = [f"{n} {us:.2f}{rate[n]}" for n, us in good.items()]
        else:
            own = good.get("native", float("nan"))
            cells = [f"{n} {us:.1f}" + (f" ({us / own:.2f})" if n != "native" else "") for n, us in good.items()]
        lines.append(f"{name} [us]: " + ", ".join(cells))
        for path in ("tma", "codec", "row"):
            best = [f"{n} {us:.2f}" for us, n in swept if n.startswith(path)][:4]
            lines += [f"    best {path}: " + "; ".join(best)] if best else []
        lines += [f"    {n}: {v}" for n, v in times.items() if isinstance(v, str)]
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="also time the tiles that tuning might take")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--section", action="append", choices=list(SECTIONS))
    parser.add_argument("--warm", help="i/n: only compile what process i of n would time")
    parser.add_argument("--check-seconds", type=float, default=150.0, help="how long the conformance suite may take")
    parser.add_argument(
        "--budget", type=float, default=280.0, help="seconds; sections that would start later are skipped"
    )
    chosen = parser.parse_args(argv)
    sections = chosen.section or list(SECTIONS)
    if chosen.warm:
        return warm(sections, chosen)
    began = time.monotonic()
    properties = torch.cuda.get_device_properties(0)
    import triton

    head = {"device": properties.name, "torch": torch.__version__, "triton": triton.__version__}
    print(f"{head['device']}, torch {head['torch']}, triton {head['triton']}", flush=True)
    flags = [f"--section={s}" for s in sections] + ["--quick"] * chosen.quick + ["--sweep"] * chosen.sweep
    processes = 6
    warmers = [
        subprocess.Popen([sys.executable, __file__, "--warm", f"{i}/{processes}", *flags],
                         stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        for i in range(processes)
    ]  # fmt: skip
    checks = {} if chosen.no_checks else run_checks(8, chosen.check_seconds, quick=chosen.quick)
    for line in checks.get("lines", []):
        print(line, flush=True)
    for process in warmers:
        try:
            process.wait(max(chosen.budget * 0.6 - (time.monotonic() - began), 1))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled and checked after {time.monotonic() - began:.0f} s", flush=True)
    records: dict[str, dict[str, Any]] = {}
    for section in sections:
        for group in SECTIONS[section](chosen.quick, chosen.sweep):
            if time.monotonic() - began > chosen.budget:
                print(f"{group.name}: skipped, {chosen.budget:g} s are over")
                break
            records[group.name] = time_group(group)
            print("\n".join(table({group.name: records[group.name]})), flush=True)
            chosen.out.mkdir(parents=True, exist_ok=True)
            result = {**head, "checks": checks, "microseconds": records}
            (chosen.out / "triton.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
            del group
            torch.cuda.empty_cache()
    print(f"done after {time.monotonic() - began:.0f} s")
    return int(bool(checks.get("failed")))


def warm(sections: list[str], chosen: argparse.Namespace) -> int:
    rank, count = map(int, chosen.warm.split("/"))
    index = 0
    for section in sections:
        for group in SECTIONS[section](chosen.quick, chosen.sweep):
            for call in group.calls.values():
                if index % count == rank:
                    try:
                        call(0)
                    except Exception as e:
                        print(e)
                index += 1
            del group
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
