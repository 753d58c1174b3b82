import os
import subprocess
import sys
import textwrap

import pytest

KERNEL = """
import os, signal
from blockscale.kernels.reference import Linear

class Kernel(Linear):
    name, priority, m_range = "plugin.linear", 10_000, (1, 64)

    def why_not(self, problem, platform):
        if problem.numerics.weight_only or problem.format is None or problem.format.name != "fp8_128x128":
            yield "made for the test"

    def run(self, problem, x, w, bias):
        {body}

KERNELS = [Kernel()]
"""


class Plugin:
    """An installed package that brings a kernel: a folder on the path with a module and its metadata."""

    def __init__(self, folder):
        self.folder = folder
        info = folder / "plugin-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[blockscale.kernels]\nplugin = plugin:KERNELS\n")

    def write(self, body):
        """The statements of the kernel's run."""
        self.source(KERNEL.format(body=textwrap.indent(body, " " * 8).strip()))

    def source(self, text):
        """The whole module."""
        (self.folder / "plugin.py").write_text(text)

    def python(self, *args, **env):
        """Run Python with the package installed."""
        path = os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ, "PYTHONPATH": path, "BLOCKSCALE_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1",
            **env,
        }  # fmt: skip
        return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment)


@pytest.fixture
def plugin(tmp_path):
    return Plugin(tmp_path / "site")
