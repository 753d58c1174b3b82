"""Kill a quantize with SIGKILL at random moments, resume it, and compare with an uninterrupted run, byte for byte.

    python bench/kill_quantize.py [--kills 50] [--workers 1]

Each round starts the command, kills it (and with it its workers) after a random time, until as many kills were made;
the last start may finish. A run that finishes before its kill starts over. Exit 1 on any difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_source(root / "src")

        def command(out: str) -> list[str]:
            base = [sys.executable, "-m", "blockscale", "quantize", str(root / "src"), str(root / out)]
            return [*base, "--json", "--shard-size", "2M", "--workers", str(options.workers)]

        started = time.perf_counter()
        subprocess.run(command("whole"), check=True, stdout=subprocess.DEVNULL)
        whole, seconds = digest(root / "whole"), time.perf_counter() - started
        kills = finished = 0
        kept: list[int] = []
        while kills < options.kills:
            process = subprocess.Popen(command("out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(rng.uniform(0.3, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                records = root / "out.unfinished" / "records"
                kept.append(len(list(records.iterdir())) if records.is_dir() else 0)
                if (root / "out").exists() and digest(root / "out") != whole:
                    print("DIFFERENT after a kill")
                    return 1
                continue
            finished += 1
            if process.returncode != 0 or digest(root / "out") != whole:
                print(f"DIFFERENT or failed (exit {process.returncode})")
                return 1
            shutil.rmtree(root / "out")
        subprocess.run(command("out"), check=True, stdout=subprocess.DEVNULL)
        same = digest(root / "out") == whole
        print(f"{kills} kills, {finished + 1} finished runs, shards found at a kill: {sorted(set(kept))}")
        print("identical" if same else "DIFFERENT")
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
