"""Small sums between two GPUs of one host without NCCL: each reads the other's memory, in one kernel.

A decode step adds some 10 kB to 2 MB, where NCCL's time is latency. torch's symmetric memory (`one_shot_all_reduce`)
takes a few microseconds. For two ranks only: a + b is b + a, but with more ranks each would add in another order, and
ranks must agree to the bit. NVLink multicast is not used.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import BlockscaleError
from .collectives import Group

LARGEST = 1 << 22
"""Bytes. Above, NCCL's bandwidth wins."""


class DirectGroup(Group):
    """A `Group` of two ranks whose small fp32 sums go through each other's memory; all else is NCCL's.

    Raises BlockscaleError for another number of ranks, or where torch cannot share the memory.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group)
        if self.size != 2 or device.type != "cuda":
            raise BlockscaleError(
                f"direct sums need 2 CUDA devices of one host, got {self.size} ranks on {device.type}"
            )
        from torch.distributed import _symmetric_memory as symmetric

        try:
            self._buffer = symmetric.empty(LARGEST // 4, dtype=torch.float32, device=device)
            symmetric.rendezvous(self._buffer, group)
        except RuntimeError as e:
            raise BlockscaleError(f"direct sums: torch cannot share memory between the two devices: {e}") from e

    def start_sum_in_place(self, x: Tensor) -> Tensor:
        size = x.numel()
        if x.dtype != torch.float32 or size * 4 > LARGEST or size % 4 or torch.compiler.is_compiling():
            return super().start_sum_in_place(x)
        mine = self._buffer[:size]
        mine.copy_(x.view(-1))
        return cast(Tensor, torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", self.name)).view(x.shape)
