"""What surrounds the device: driver, compilers, packages and whether they fit together. For reports, never for choices.

Kernels choose by `Platform` alone. This is what `doctor` and conformance reports add, so that two machines can be told
apart and what is missing can be named with the command that gets it. Nothing here raises: a broken driver or a
half-installed package is a finding.
"""

from __future__ import annotations

import platform as host
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch

from .version import __version__

_NVIDIA = "/sys/module/nvidia/version"
_DRIVERS = {"cuda": _NVIDIA, "rocm": "/sys/module/amdgpu/version", "xpu": "/sys/module/xe/version"}
_TRITON_OF_TORCH = {"2.11": "3.6", "2.13": "3.7"}
"""Pairs that we have run. Others are not judged."""


@dataclass(frozen=True)
class Tool:
    """A compiler or an optional package.

    state: its version, "missing", or what is wrong with it. purpose: what it brings. command: how to get it.
    """

    name: str
    state: str
    purpose: str
    command: str

    @property
    def there(self) -> bool:
        return not self.state.startswith(("missing", "broken"))


def facts(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions and names: blockscale, python, system, processor or device, driver."""
    kind = str(device).partition(":")[0]  # not torch's parser, which raises for a name that it does not know
    found = {
        "blockscale": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "system": _safely(host.platform),
        "device": _safely(lambda: _device_name(torch.device(device))),
    }
    if kind != "cpu":
        found["driver"] = driver("rocm" if torch.version.hip else kind)
    return found


def driver(kind: str) -> str:
    """Version of the kernel driver, "unknown" where the system does not say."""
    path = Path(_DRIVERS.get(kind, ""))
    return _safely(lambda: path.read_text().strip() if path.is_file() else "unknown")


def compilers() -> list[Tool]:
    """C++ for cpu.native; the vendors' where people build kernels of their own."""
    wanted = {
        "g++": ("builds cpu.native, the fast CPU kernels", "apt-get install g++, then reinstall blockscale"),
        "nvcc": ("not needed by blockscale: Triton brings its own ptxas", "install the CUDA toolkit"),
        "ocloc": ("machine code for Intel GPUs ahead of time (make test-xpu)", "apt-get install intel-ocloc"),
    }
    return [Tool(name, _program(name), *texts) for name, texts in wanted.items()]


def packages() -> list[Tool]:
    """Optional packages, imported to see whether they really work."""
    wanted = {
        "triton": ("the triton.* and gluon.* kernels", f"pip install 'triton=={paired_triton() or '3'}.*'"),
        "transformers": ("blockscale run, load and bench model", "pip install 'blockscale[transformers]'"),
        "gguf": ("reading GGUF files", "pip install 'blockscale[gguf]'"),
        "matplotlib": ("plots in reports", "pip install 'blockscale[plots]'"),
        "deep_gemm": ("deep_gemm.fp8_gemm_nt on Hopper", "build it from github.com/deepseek-ai/DeepGEMM"),
        "vllm": ("our kernels inside vLLM (docs/vllm.md)", "pip install vllm==0.33.0"),
        "vllm_xpu_kernels": ("the xpu.* kernels on Intel GPUs", "pip install vllm-xpu-kernels, beside a torch for XPU"),
    }
    return [Tool(name, _package(name), *texts) for name, texts in wanted.items()]


def paired_triton() -> str | None:
    """The triton version that the installed torch asks for, None when it is not known."""
    return _TRITON_OF_TORCH.get(".".join(torch.__version__.split("+")[0].split(".")[:2]))


def pairing() -> str | None:
    """What is wrong between torch and triton; None when they fit, or one is missing or unknown."""
    want, have = paired_triton(), _safely(lambda: metadata.version("triton"), "")
    if not want or not have or f"{have}.".startswith(f"{want}."):
        return None
    return f"torch {torch.__version__} goes with triton {want}, got {have}: pip install 'triton=={want}.*'"


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        match = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
        return f"{match[1] if match else host.processor()}, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


def _program(name: str) -> str:
    path = shutil.which(name)
    if not path:
        return "missing"
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as e:
        return f"broken: {e}"
    found = re.search(r"\d+\.\d+[.\d]*", answer.stdout)
    return found[0] if found else "there"


def _package(name: str) -> str:
    """Version of an importable package; imported in a process of its own, since a broken one may take it down."""
    try:
        if util.find_spec(name) is None:
            return "missing"
    except (ImportError, ValueError) as e:
        return f"broken: {type(e).__name__}: {e}"
    try:
        tried = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"import {name}"], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.SubprocessError) as e:
        return f"broken: {e}"
    if tried.returncode < 0:
        return f"broken: importing it ends the process with signal {-tried.returncode}"
    if tried.returncode:
        return f"broken: {(tried.stderr.strip() or 'import fails').splitlines()[-1]}"
    return _safely(lambda: metadata.version(name.replace("_", "-")), "there") or "there"


def _safely(ask: Callable[[], str], otherwise: str = "unknown") -> str:
    """An answer, or `otherwise` and why: drivers and metadata raise whatever they like."""
    try:
        return ask()
    except Exception as e:
        return otherwise if not isinstance(e, RuntimeError) else f"{otherwise}: {str(e).splitlines()[0]}"
