"""Compile what Triton launchers would launch, for a GPU that is not here: nothing runs, no GPU is asked.

`aot` makes its table of it, and tests load this file by its path, without the folder around it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from blockscale.formats import get_format
from blockscale.platform import Platform
from blockscale.tensor import BlockScaled


def platform_of(target: str) -> Platform:
    return Platform.parse(f"{'cuda' if target.startswith('sm_') else 'rocm'}:{target}+triton=3.7.1")


def weight(name: str, n: int, k: int, p: Platform, experts: int = 0) -> BlockScaled:
    """An uninitialised weight in the layout that the platform's kernel reads."""
    fmt, lead = get_format(name), (experts,) if experts else ()
    fnuz = p.arch == "gfx942" and fmt.element.name == "fp8"
    data = torch.empty(*lead, *fmt.data_shape(n, k), dtype=torch.float8_e4m3fnuz if fnuz else fmt.element.dtype)
    scale_dtype = torch.float32 if fnuz else fmt.scale_dtype
    scale = torch.empty(*lead, *fmt.scale_shape(n, k), dtype=scale_dtype)
    level = torch.empty(lead, dtype=torch.float32) if fmt.two_level else None
    return BlockScaled.trusted(data, scale, fmt, "fnuz" if fnuz else "row", (*lead, n, k), level)


@contextmanager
def recorded() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Collect (kernel, args, kwargs) of every Triton launch instead of launching."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    launch = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = launch


def compile_for(target: str, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `JITFunction.run` compiles at the first launch, for a target that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kind, arch = ("cuda", int(target[3:])) if target.startswith("sm_") else ("hip", target)
    gpu = GPUTarget(kind, arch, 64 if target.startswith("gfx9") else 32)
    backend = make_backend(gpu)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, _ = create_function_from_signature(fn.signature, fn.params, backend)(*args, **kwargs)
    options, signature, constants, attrs = fn._pack_args(backend, kwargs, bound, specialization, None)
    return triton.compile(ASTSource(fn, signature, constants, attrs), target=gpu, options=options.__dict__)


def spills(compiled: Any, target: str) -> int | None:
    """Bytes (NVIDIA) or vector registers (AMD) spilled to memory, None if the compiler does not say."""
    if "amdgcn" in compiled.asm:
        return sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]))
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    capability = int(target[3:])
    try:
        ptxas = get_ptxas(capability)
    except TypeError:  # triton 3.6 has one ptxas and takes no argument
        ptxas = get_ptxas()
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(compiled.asm["ptx"])
        f.flush()
        command = [ptxas.path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", f.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r"(\d+) bytes spill stores", done.stderr)
    return sum(map(int, found)) if found else None
