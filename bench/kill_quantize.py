"""Kill a quantize with SIGKILL at random moments, resume it, and compare with an uninterrupted run, byte for byte.

    python bench/kill_quantize.py [--kills 50]

Each round a child process goes on where the last was killed, and is killed after a random time; one that finishes
before its kill is compared, and the next starts over. The child is forked from a process that has everything imported,
so that kills land in the work and not in the start. Exit 1 on any difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from blockscale.checkpoint import quantize_checkpoint


def make_source(path: Path) -> None:
    """About 48 MB in 3 files: enough work that kills land everywhere."""
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        tensors = {
            f"model.layers.{i}.{name}.weight": torch.randn(1000, 1100, generator=generator).bfloat16()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
        }
        save_file(tensors, path / f"model-{i + 1:05d}-of-00003.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))


def digest(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


def run(src: Path, dst: Path) -> None:
    quantize_checkpoint(src, dst, "fp8_128x128", shard_size=2 << 20)


def start(src: Path, dst: Path) -> int:
    """A child that does the work and exits 0."""
    pid = os.fork()
    if pid == 0:
        try:
            run(src, dst)
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # no OpenMP team exists that a fork would lose
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_source(root / "src")
        run(root / "src", root / "warm")
        started = time.perf_counter()
        run(root / "src", root / "whole")
        whole, seconds = digest(root / "whole"), time.perf_counter() - started
        kills = finished = 0
        kept: Counter[int] = Counter()
        while kills < options.kills:
            pid = start(root / "src", root / "out")
            deadline, status, done = time.perf_counter() + rng.uniform(0, 0.5) * seconds, 0, 0
            while time.perf_counter() < deadline and not done:
                done, status = os.waitpid(pid, os.WNOHANG)
                time.sleep(0.001)
            if not done:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
                records = root / "out.unfinished" / "records"
                kept[len(list(records.iterdir())) if records.is_dir() else 0] += 1
            elif status:
                print(f"a resumed run failed (status {status})")
                return 1
            if (root / "out").exists():  # finished, perhaps a moment before its kill
                finished += 1
                if digest(root / "out") != whole:
                    print("DIFFERENT")
                    return 1
                shutil.rmtree(root / "out")
        run(root / "src", root / "out")
        same = digest(root / "out") == whole
        print(f"{kills} kills, {finished + 1} finished runs; shards there at a kill: {dict(sorted(kept.items()))}")
        print("identical" if same else "DIFFERENT")
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
