"""What the executed tier needs besides `make setup`: a venv with Intel's Triton and CPU OpenCL, and ocloc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = (
    "triton-xpu==3.3.0b1",
    "pyopencl==2026.1.4",
    "intel-opencl-rt==2026.2.0",
    "intel-cmplr-lib-rt==2026.2.0",  # needed by intel-opencl-rt, which does not say so
    "numpy<3",
)
"""triton-xpu takes the package name `triton`: hence a venv of its own. 3.3.0b1 is the newest on PyPI."""
OCLOC_PACKAGES = ("intel-ocloc", "intel-opencl-icd")
"""Where Debian has it: a package of its own since trixie, before that beside the OpenCL driver."""


def venv_python(folder: Path) -> Path:
    """The interpreter of the XPU venv, made and filled where it is not there. Raises CalledProcessError."""
    python = folder / "bin" / "python"
    stamp = folder / ".ready"
    wanted = "\n".join((sys.version, *REQUIREMENTS))
    if not stamp.exists() or stamp.read_text() != wanted:
        said(f"installing {', '.join(REQUIREMENTS)} into {folder}")
        run = {"check": True, "stdin": subprocess.DEVNULL}
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], **run)  # type: ignore[call-overload]
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], **run)  # type: ignore[call-overload]
        stamp.write_text(wanted)
    return python


def ocloc() -> tuple[str | None, str]:
    """(Intel's offline compiler, why there is none): installed from Debian where that is possible."""
    found = shutil.which("ocloc")
    if found:
        return found, ""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return None, f"no ocloc, and no root with apt-get to install one of {', '.join(OCLOC_PACKAGES)}"
    said("installing ocloc")
    output = apt("update")
    for package in OCLOC_PACKAGES:
        output += apt("install", "-y", "--no-install-recommends", package)
        found = shutil.which("ocloc")
        if found:
            return found, ""
    return None, f"apt-get did not install ocloc: {output.strip()[-600:]}"


def apt(*arguments: str) -> str:
    """Run apt-get without questions, waiting for another apt's lock. What it printed, error or not."""
    done = subprocess.run(
        ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *arguments],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    return done.stdout + done.stderr


def versions() -> dict[str, str]:
    """What the rows of the report were made with."""
    found = dict(r.split("==") for r in REQUIREMENTS if "==" in r)
    for package in OCLOC_PACKAGES if shutil.which("dpkg-query") else ():
        command = ["dpkg-query", "-W", "-f", "${Version}", package]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode == 0 and done.stdout:
            found[package] = done.stdout
    return found


def said(text: str) -> None:
    print(text, flush=True)
