"""Sums and gathers through shared memory: their logic and their kernels, over memory that processes share on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.parametrize("size", [2, 3])
def test_direct_sums_over_processes(size, tmp_path):
    paths = [str(HERE.parents[1] / "src"), str(HERE), str(HERE.parent)]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    memory = tmp_path / "memory"
    memory.touch()
    command = [sys.executable, str(HERE / "direct_ranks.py")]
    port = str(free_port())
    started = [
        subprocess.Popen(
            [*command, str(rank), str(size), port, str(memory)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [text.splitlines()[-1] for text in said] == [f"rank {rank} done" for rank in range(size)], "\n".join(said)
