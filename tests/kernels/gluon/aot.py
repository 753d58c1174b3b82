"""Compile Gluon kernels for sm_90 on a machine without a GPU, through the same arguments that a launch would pass."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from blockscale.kernels.gluon.launch import Launch


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
