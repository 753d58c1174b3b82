"""Memory that the GPUs of one host share: each reads and writes the others' over NVLink.

torch's symmetric memory hands it out. Copies run beside the multiplications: the copy engines move them, on a stream
of their own, and take no multiprocessor. NVLink multicast is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import BlockscaleError


class SharedMemory:
    """`nbytes` on every rank of the group, zero at first.

    Raises BlockscaleError where torch cannot share it.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, nbytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        try:
            self._tensor = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
            self._handle = symmetric.rendezvous(self._tensor, group)
        except RuntimeError as e:
            raise BlockscaleError(f"direct sums: torch cannot share memory between the devices: {e}") from e
        self._tensor.zero_()
        self.addresses = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        module = torch.get_device_module(device)
        self._current, self._within, self._beside = module.current_stream, module.stream, module.Stream(device)
        self.barrier()

    def view(self, rank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of a rank as a tensor. offset: bytes, a multiple of the element."""
        return self._handle.get_buffer(rank, tuple(shape), dtype, offset // dtype.itemsize)

    def barrier(self) -> None:
        """What comes after on any rank's stream comes after what lies before on every other's."""
        self._handle.barrier()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Copies that start when the work so far is done, and run beside the work to come. Keep their sources."""
        self._beside.wait_stream(self._current())
        with self._within(self._beside):
            yield

    def join(self) -> None:
        """Work to come waits for the copies."""
        self._current().wait_stream(self._beside)
