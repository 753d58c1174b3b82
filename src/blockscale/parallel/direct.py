"""Sums and gathers between GPUs of one host through each other's memory, without NCCL's kernels.

- A decode step adds 10 kB to 4 MB, where NCCL's time is latency: one kernel pushes, waits, adds and rounds
  (`kernels/triton/peer_sum`).
- A prefill step adds 100 MB. Its rows are multiplied in turns, those that other ranks keep first: they travel by copy
  engine while this rank's own are multiplied, are added in fp32 there, rounded once, and only then go to everybody, in
  half the bytes. The order of the work does what a split in chunks cannot: kernels that occupy every multiprocessor
  let no other kernel run beside them, but copies they do.

All ranks add in the order of their numbers: the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import platform
from ..errors import BlockscaleError
from . import turns
from .collectives import Arriving, Group
from .cuts import Range, shares
from .memory import SharedMemory

SMALL = 1 << 22
"""Bytes of addends up to which one kernel does it all."""
MOST = 8
"""Ranks: GPUs of one host."""
_ALIGNED = 256


class DirectGroup(Group):
    """A `Group` whose sums and gathers of rows go through shared memory; what does not fit, and compiled code, is the
    backend's.

    room: bytes that are set aside for large sums on each GPU, half as much for gathers, and what sums come to. A sum
    that is larger goes in several rounds.

    Raises BlockscaleError where torch cannot share memory, or when a first sum comes out wrong.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, *, room: int = 1 << 28, memory: Any = SharedMemory
    ) -> None:
        super().__init__(group)
        if not 2 <= self.size <= MOST:
            raise BlockscaleError(f"direct sums need 2 to {MOST} devices of one host, got {self.size}")
        from ..kernels.triton import peer_sum

        self._kernels = peer_sum
        self._flags = 2 * self.size * SMALL
        self._slots = self._flags + self.size * (SMALL // peer_sum.BLOCK_BYTES) * 4
        self._slot = room // self.size // _ALIGNED * _ALIGNED
        self._done = self._slots + self.size * self._slot
        self._gathers, self._gather_room, self._next = self._done + self._slot, room // 2, 0
        self._memory = memory(group, device, self._gathers + self._gather_room)
        self._counters = peer_sum.counters(SMALL, device)
        self._processors = int(platform.detect(device).value("sms") or 0)
        self._try(device)

    def _try(self, device: torch.device) -> None:
        want = [sum(range(1, self.size + 1)) * 2.0**-9, float(self.size)]
        for _ in range(3):
            x = torch.tensor([[(self.rank + 1) * 2.0**-9, 1.0] * 8], device=device)
            got = self.start_sum(x, torch.float32)()[0, :2].tolist()
            if got != want:
                raise BlockscaleError(f"direct sums: got {got} for {want} in a first sum over {self.size} devices")

    def start_sum(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Callable[[], Tensor]:
        if self.takes_turns(x.shape[0], x.shape[1], x.dtype):
            y = self.sum_in_turns(lambda b, e: x[b:e], x.shape[0], x.shape[1], x.dtype, dtype, bias=bias)
            return lambda: y
        size = x.numel() * x.element_size()
        if not size or size > SMALL // (self.size - 1) or x.numel() % 16 or torch.compiler.is_compiling():
            return super().start_sum(x, dtype, bias)
        y = torch.empty_like(x, dtype=dtype)
        self._kernels.sum_small(
            x.contiguous(), y, bias, self._memory.addresses, self._counters, self.rank, slot_bytes=SMALL,
            flags=self._flags,
        )  # fmt: skip
        return lambda: y

    def takes_turns(self, rows: int, width: int, sums: torch.dtype) -> bool:
        large = rows * width * sums.itemsize > SMALL // (self.size - 1)
        return large and rows >= self.size and width % 16 == 0 and not torch.compiler.is_compiling()

    def sum_in_turns(
        self, multiply: Callable[[int, int], Tensor], rows: int, width: int, sums: torch.dtype, dtype: torch.dtype, *,
        bias: Tensor | None = None, scatter: bool = False, met: bool = False,
    ) -> Tensor:  # fmt: skip
        memory, (begin, end) = self._memory, shares(rows, self.size)[self.rank]
        y = torch.empty(end - begin if scatter else rows, width, dtype=dtype, device=memory.addresses.device)
        apart = self._slot // sums.itemsize
        for now in self._rounds(rows, width, max(sums.itemsize, dtype.itemsize)):
            first, last = now[self.rank]
            kept = y[first - begin : last - begin] if scatter else y[first:last]
            if not met:
                memory.barrier()  # nobody reads what lay in the slots any more
            met = False
            for at, part in self._send_parts(multiply, now, width, sums):
                row = at - first
                own = kept[row : row + part.shape[0]]
                again = memory.view(self.rank, self._done + row * width * dtype.itemsize, own.shape, dtype)
                skipped = row * width
                slots = memory.view(
                    self.rank, self._slots + skipped * sums.itemsize, (self.size * apart - skipped,), sums
                )
                self._kernels.add_arrived(
                    part, slots, own, None if scatter else again, bias, self.rank, self.size, apart
                )
            if not scatter:
                memory.barrier()
                for rank in range(self.size):
                    b, e = now[rank]
                    if rank != self.rank and e > b:
                        y[b:e].copy_(memory.view(rank, self._done, (e - b, width), dtype))
        return y

    def _rounds(self, rows: int, width: int, itemsize: int) -> list[tuple[Range, ...]]:
        return turns.rounds(shares(rows, self.size), max(1, self._slot // (width * itemsize)))

    def regions(self, rows: int, width: int, sums: torch.dtype, dtype: torch.dtype) -> list[Range]:
        owners = shares(rows, self.size)
        one_round = len(self._rounds(rows, width, max(sums.itemsize, dtype.itemsize))) == 1
        return turns.regions(owners, self.rank, width, self._processors if one_round else 0)

    def _send_parts(
        self, multiply: Callable[[int, int], Tensor], now: tuple[Range, ...], width: int, sums: torch.dtype
    ) -> list[tuple[int, Tensor]]:
        """Everybody's rows multiplied and those of others sent; this rank's own: (first row, addends)."""
        memory, sent, mine = self._memory, list[Tensor](), list[tuple[int, Tensor]]()
        for begin, end in turns.regions(now, self.rank, width, self._processors):
            part = multiply(begin, end)
            sent.append(part)
            for rank, (b, e) in enumerate(now):
                low, high = max(b, begin), min(e, end)
                if low >= high:
                    continue
                rows = part[low - begin : high - begin]
                if rank == self.rank:
                    mine.append((low, rows))
                    continue
                place = self._slots + self.rank * self._slot + (low - b) * width * sums.itemsize
                with memory.beside():
                    memory.view(rank, place, rows.shape, sums).copy_(rows)
        memory.join()
        memory.barrier()
        return mine

    def start_gather(self, parts: list[Tensor]) -> Arriving:
        sizes = [-(-self.size * part.numel() * part.element_size() // _ALIGNED) * _ALIGNED for part in parts]
        if sum(sizes) > self._gather_room // 2 or torch.compiler.is_compiling():
            return super().start_gather(parts)
        if self._next + sum(sizes) > self._gather_room:
            self._next = 0
        offsets = [self._gathers + self._next + sum(sizes[:i]) for i in range(len(sizes))]
        self._next += sum(sizes)
        return _Pushed(self, self._memory, parts, offsets)


class _Pushed(Arriving):
    """Rows on their way into everybody's shared memory, where they stay until half the room is used again."""

    def __init__(self, group: DirectGroup, memory: SharedMemory, parts: list[Tensor], offsets: list[int]) -> None:
        self._group, self._memory, self._parts, self._offsets = group, memory, parts, offsets
        self._arrived = False
        memory.barrier()
        with memory.beside():
            for rank in range(group.size):
                for part, offset in zip(parts, offsets, strict=True):
                    memory.view(rank, offset + group.rank * _bytes(part), part.shape, part.dtype).copy_(part)

    def of(self, rank: int) -> list[Tensor]:
        if rank == self._group.rank:
            return self._parts
        self._wait()
        return [
            self._memory.view(self._group.rank, offset + rank * _bytes(part), part.shape, part.dtype)
            for part, offset in zip(self._parts, self._offsets, strict=True)
        ]

    def whole(self) -> list[Tensor]:
        self._wait()
        return [
            self._memory.view(self._group.rank, offset, (self._group.size * part.shape[0], *part.shape[1:]), part.dtype)
            for part, offset in zip(self._parts, self._offsets, strict=True)
        ]

    def _wait(self) -> None:
        if not self._arrived:
            self._memory.join()
            self._memory.barrier()
            self._arrived = True


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
