"""The vLLM plugin against the real vLLM 0.33.0 (`make test-vllm`); not in `make test`, since it downloads gigabytes.

python tests/vllm/run.py                      makes .venv-vllm with `pip install vllm==0.33.0`, runs the tests in it
python tests/vllm/run.py --python PATH        uses a Python that has vLLM already

The tests are real.py and model.py, which say what they execute. No GPU is needed: vLLM's Python code runs as on a CPU
(VLLM_TARGET_DEVICE=cpu).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VERSION = "0.33.0"


def prepared() -> Path:
    """A Python with vLLM, installed when it is not there yet."""
    venv = ROOT / ".venv-vllm"
    python, ready = venv / "bin" / "python", venv / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", f"vllm=={VERSION}", "pytest", "typer"], check=True)
        ready.touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="a Python that has vLLM")
    python = parser.parse_args().python or prepared()
    with tempfile.TemporaryDirectory() as folder:
        metadata = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder]  # our entry point, unbuilt
        subprocess.run(metadata, cwd=ROOT, check=True)
        path = os.pathsep.join([folder, str(ROOT / "src"), str(ROOT / "tests"), str(HERE)])
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", folder]
        tests = [str(HERE / "real.py"), str(HERE / "model.py")]
        return subprocess.run([*command, *tests], cwd=folder, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
