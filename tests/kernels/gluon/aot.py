"""Compile Gluon kernels for sm_90 on a machine without a GPU, through the same arguments that a launch would pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from blockscale.kernels.gluon import swap, tables, wide
from blockscale.kernels.gluon.config import Config, Wide
from blockscale.kernels.gluon.launch import Launch
from blockscale.kernels.gluon.selection import by_rule


class _Hopper:
    """Stands in for triton's driver: an sm_90 device 0 that never runs anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_for_hopper(launch: Launch) -> Any:
    """The compiled kernel: `.asm` holds "ptx" and "cubin", `.metadata` shared memory and warps."""
    before = driver._active
    driver.set_active(_Hopper())
    try:
        return launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants, **launch.options)
    finally:
        driver._active = before


def launch(
    config: Config, m: int, n: int, k: int, out: torch.dtype = torch.bfloat16, e8m0: bool = False, early: bool = False
) -> Launch:
    """A launch on 132 SMs with a bias; early: see `gemm.launch`."""
    x, w = (torch.zeros(rows, k, dtype=torch.float8_e4m3fn) for rows in (m, n))
    x_scale = torch.ones(-(-k // 128), -(-m // 4) * 4)
    w_scale = torch.ones(-(-n // 128), -(-k // 128), dtype=torch.uint8 if e8m0 else torch.float32)
    operands = (x, x_scale, w, w_scale, torch.zeros(n, dtype=out), torch.empty(m, n, dtype=out))
    if isinstance(config, Wide):
        return wide.launch(*operands, config, 132, early=early)
    return swap.launch(*operands, config, 132, early=early)


def chosen() -> list[tuple[str, tuple[int, int, int]]]:
    """Every configuration of the table, and what the rule gives other shapes, each with one shape that gets it."""
    found = {}
    for path in Path(tables.__file__).parent.glob("*.json"):
        for key, rows in tables.read(path.stem).items():
            n, k = map(int, key.split("x"))
            found |= {text: (int(m), n, k) for m, text in rows.items()}
    for n, k in ((576, 7168), (5120, 3072), (3584, 4608), (2048, 5120), (24576, 1536), (32768, 512)):
        found |= {str(by_rule(m, n, k, 132)): (m, n, k) for m in (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)}
    return sorted(found.items())
