"""Run the folder `interpreted` with Triton's interpreter: every kernel, on this CPU, against the reference."""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreted"


def test_interpreted_suite():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", str(FOLDER)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) > 100
    assert "skipped" not in done.stdout
