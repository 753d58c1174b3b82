"""Builds the native CPU library where a C++ compiler exists; everything else is in pyproject.toml.

The library is one shared object with a C interface and no Python in it, so one wheel serves every Python. `kernels.cc`
is compiled once for each instruction set; `main.cc` chooses at run time. Without a compiler the install succeeds and
`blockscale doctor` says what is missing: the torch path `cpu.slices` then serves.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/blockscale/kernels/cpu/native")

FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-fno-math-errno",
    "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Wno-psabi",  # vectors never cross a library boundary
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",  # GCC 12's own AVX-512 headers
]  # fmt: skip

ISAS = {
    "x86_64": {
        "sse2": ["-march=x86-64"],
        "avx2": ["-march=haswell"],
        "avx512": ["-march=skylake-avx512", "-mprefer-vector-width=512"],
        "avx512bf16": [
            "-march=skylake-avx512",
            "-mprefer-vector-width=512",
            "-mavx512bf16",
            "-mavx512vnni",
            "-mavx512vbmi",
        ],  # Zen 4, Sapphire Rapids and their successors
    },
    "aarch64": {"neon": ["-march=armv8-a"]},
}


def isas(machine: str) -> dict[str, list[str]]:
    """Compiler flags of each set of kernels; main.cc lists the same names."""
    return ISAS.get({"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine), {"generic": []})


class BuildNative(build_ext):
    """Compiles the same source several times, and lets an install without a compiler succeed."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python in it, so no Python tag

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_native(ext)
        except Exception:
            self.warn("no working C++ compiler: installing without cpu.native; the slower torch path cpu.slices serves")
            raise  # setuptools carries on, since the extension is optional

    def build_native(self, ext: Extension) -> None:
        compiler: Any = self.compiler
        temporary = Path(self.build_temp)
        jobs: list[tuple[str, str, list[str]]] = [("main.cc", "main", [])]
        for isa, flags in isas(platform.machine().lower()).items():
            jobs.append(("kernels.cc", isa, [*flags, f"-DBLOCKSCALE_ISA={isa}"]))

        def run(job: tuple[str, str, list[str]]) -> list[str]:
            source, folder, flags = job
            output = str(temporary / folder)
            made: list[str] = compiler.compile([str(NATIVE / source)], output_dir=output, extra_postargs=FLAGS + flags)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for made in pool.map(run, jobs) for name in made]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # -fopenmp names libgomp.so.1, the one that torch has loaded; a second OpenMP runtime would be a bug.
        compiler.link_shared_object(
            objects, str(target), extra_postargs=["-fopenmp", "-s"], target_lang="c++", build_temp=str(temporary)
        )


class AnyPython(bdist_wheel):
    """Tags the wheel for a platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension(
            "blockscale.kernels.cpu._native",
            [str(NATIVE / "main.cc"), str(NATIVE / "kernels.cc")],
            depends=sorted(str(header) for header in NATIVE.glob("*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
