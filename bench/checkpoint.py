"""How fast and how frugal `quantize` is, as ratios to `cp` of the same files in the same run.

    python bench/checkpoint.py [--gigabytes 8] [--folder DIR] [--json FILE]

A synthetic BF16 model in shards of about 1 GB is quantized to fp8_128x128. Interleaved with that, `cp -r` copies it.
    throughput   bytes read and written a CPU second (user + system), quantize over cp. Per core, whatever the load.
    wall         the same by wall time, one worker.
    memory       peak resident memory, against 3x the largest tensor + 200 MB.
    workers      wall time of one worker over two, each with one thread: of whole commands, and of the work in them,
                 from the first event to the last (the second worker's start, seconds of importing torch, is in both).
Best of `--repeat` runs: other users of the machine only ever add time. Disks are synced before each run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROWS, COLS = 14336, 4096  # the largest tensor: 117 MB


def make_source(path: Path, gigabytes: float) -> int:
    """Returns the bytes written. One random shard, copied under other names: the content does not matter."""
    path.mkdir()
    per_shard = 8
    shards = max(1, round(gigabytes * 1e9 / (per_shard * ROWS * COLS * 2)))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(ROWS, COLS, generator=generator).bfloat16() for _ in range(2)]
    total = 0
    for i in range(shards):
        names = [f"model.layers.{i}.mlp.linear_{j}.weight" for j in range(per_shard)]
        file = path / f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[j % 2].clone() for j, name in enumerate(names)}, file)
        total += file.stat().st_size
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return total


def timed(command: list[str], threads: int | None = None) -> dict[str, float]:
    """Of one command and its children: seconds in all, since its "start" event, and of CPU; peak memory in bytes."""
    os.sync()
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    script = (
        "import resource, subprocess, sys, json, time\n"
        "t = time.perf_counter(); p = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE); at = t\n"
        "for line in p.stdout:\n"
        "    at = time.perf_counter() if b'start' in line else at\n"
        "assert p.wait() == 0\n"
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); end = time.perf_counter()\n"
        "print(json.dumps([end - t, end - at, u.ru_utime + u.ru_stime, u.ru_maxrss * 1024]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, capture_output=True, text=True, env=environment
    )
    wall, work, cpu, peak = json.loads(done.stdout)
    return {"wall": wall, "work": work, "cpu": cpu, "peak": peak}


def quantize(src: Path, dst: Path, workers: int, report: str) -> list[str]:
    base = [sys.executable, "-m", "blockscale", "quantize", str(src), str(dst), "--json", "--shard-size", "256M"]
    return [*base, "--workers", str(workers), "--report", report]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        read = make_source(root / "src", options.gigabytes)
        runs: dict[str, list[dict[str, float]]] = {"start": [], "cp": [], "one": [], "no report": [], "two": []}
        written = 0
        for _ in range(options.repeat):
            for name in runs:
                out = root / "out"
                if name == "start":
                    runs[name].append(timed([sys.executable, "-m", "blockscale", "quantize", "--help"], 1))
                    continue
                if name == "cp":
                    runs[name].append(timed(["cp", "-r", str(root / "src"), str(out)]))
                else:
                    workers, report = (2 if name == "two" else 1), ("none" if name == "no report" else "sample")
                    runs[name].append(timed(quantize(root / "src", out, workers, report), threads=1))
                    written = sum(p.stat().st_size for p in out.iterdir())
                shutil.rmtree(out)
        best = {name: {k: min(run[k] for run in found) for k in found[0]} for name, found in runs.items()}
        print_and_save(best, read, written, options.json)


def print_and_save(best: dict[str, dict[str, float]], read: int, written: int, path: Path | None) -> None:
    largest = ROWS * COLS * 2
    limit = 3 * largest + 200e6
    cp_rate = 2 * read / best["cp"]["cpu"]
    start = best["start"]

    def share(name: str, key: str) -> float:
        """Throughput over cp's, the start of Python and torch apart."""
        return (read + written) / (best[name][key] - start[key]) / (2 * read / best["cp"][key])

    result: dict[str, Any] = {
        "read_bytes": read,
        "written_bytes": written,
        "cp_bytes_per_cpu_second": cp_rate,
        "throughput_over_cp_cpu": share("one", "cpu"),
        "throughput_over_cp_cpu_without_report": share("no report", "cpu"),
        "throughput_over_cp_wall": share("one", "wall"),
        "throughput_over_cp_wall_without_report": share("no report", "wall"),
        "peak_memory_bytes": best["one"]["peak"],
        "peak_memory_limit_bytes": limit,
        "start_memory_bytes": start["peak"],
        "two_workers_speedup": best["one"]["wall"] / best["two"]["wall"],
        "two_workers_speedup_of_the_work": best["one"]["work"] / best["two"]["work"],
        "start_seconds": start["wall"],
        "runs": best,
        "own_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for key, value in result.items():
        if key != "runs":
            print(f"{key:45s} {value:.4g}")
    if path:
        path.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
