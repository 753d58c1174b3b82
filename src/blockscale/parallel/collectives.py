"""The collectives that the layers need, on torch's functional ones, so that torch.compile and CUDA graphs take them.

`torch.ops._c10d_functional` is what `torch.distributed._functional_collectives` is made of; the Python names of the
latter differ between torch 2.11 and 2.13. A result is waited for where it is used, which lets work go on meanwhile.
8-bit floats travel as bytes: no backend knows them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

_OPS = torch.ops._c10d_functional
LARGE = 1 << 22
"""Bytes of a sum from which it is scattered, rounded and gathered: latency twice, but three quarters of the bytes."""


class Arriving(ABC):
    """Rows `[rows, …]` of every rank, the same number of each, on their way here. Some tensors travel together."""

    @abstractmethod
    def whole(self) -> list[Tensor]:
        """Each as `[size * rows, …]`. To be used at once: shared memory takes other rows later (`direct`)."""

    @abstractmethod
    def of(self, rank: int) -> list[Tensor]:
        """One rank's rows of each."""


class Group:
    """A process group with what the functional collectives ask of it. One rank needs no backend at all."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.name = "" if group is None else group.group_name

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """The sum ("sum") or largest ("max") over ranks; the same bits on every rank."""
        return self.wait(self.start_all_reduce(x, op))

    def start_all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """The same, not waited for: nothing may look at the result before `wait`."""
        return x if self.size == 1 else cast(Tensor, _OPS.all_reduce(x.contiguous(), op, self.name))

    def start_sum_in_place(self, x: Tensor) -> Tensor:
        """The same sum into x itself, which nobody else holds: saves a copy. A compiler finds that out by itself."""
        if self.size == 1 or torch.compiler.is_compiling():
            return self.start_all_reduce(x)
        return cast(Tensor, _OPS.all_reduce_(x, "sum", self.name))

    def sum(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of `x: [rows, width]` over ranks, added in fp32 (or in x's own dtype) and rounded once to `dtype`."""
        return self.start_sum(x, dtype)()

    def start_sum(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Callable[[], Tensor]:
        """The same, not waited for: what is returned finishes it. x is nobody else's. bias: `[width]`, added before
        the sum is rounded."""
        if self._by_halves(x, dtype):
            mine = self.start_reduce_scatter(x)
            return lambda: self.all_gather(_rounded(self.wait(mine), dtype, bias))
        y = self.start_sum_in_place(x)
        return lambda: _rounded(self.wait(y), dtype, bias)

    def _by_halves(self, x: Tensor, dtype: torch.dtype) -> bool:
        if self.size == 1 or torch.compiler.is_compiling() or x.shape[0] % self.size:
            return False
        return dtype.itemsize < x.element_size() and x.numel() * x.element_size() >= LARGE

    def start_scattered_sum(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Callable[[], Tensor]:
        """The same of this rank's share of the rows, which must divide by the ranks."""
        y = self.start_reduce_scatter(x)
        return lambda: _rounded(self.wait(y), dtype, bias)

    def takes_turns(self, rows: int, width: int, sums: torch.dtype) -> bool:
        """Whether a sum `[rows, width]` is best made by `sum_in_turns`."""
        return False

    def sum_in_turns(
        self, multiply: Callable[[int, int], Tensor], rows: int, width: int, sums: torch.dtype, dtype: torch.dtype, *,
        bias: Tensor | None = None, scatter: bool = False, met: bool = False,
    ) -> Tensor:  # fmt: skip
        """The sum over ranks of `multiply(begin, end)`, addends `[end - begin, width]` in dtype `sums`, for all rows.

        Rows that another rank keeps are multiplied first and travel while this rank's own are multiplied. scatter:
        only this rank's share of the rows (`cuts.shares`) is returned. met: rows gathered in this group have arrived
        since its last large sum, so that every rank is known to be done with that one.

        Here all rows in one turn, which hides nothing (and whose shares are equal); `direct` takes one for each rank.
        """
        start = self.start_scattered_sum if scatter else self.start_sum
        return start(multiply(0, rows), dtype, bias)()

    def regions(self, rows: int, width: int, sums: torch.dtype, dtype: torch.dtype) -> list[tuple[int, int]]:
        """Ranges of rows in the order in which `sum_in_turns` works on them: it multiplies each, or parts of it."""
        return [(0, rows)]

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum of `x: [size * rows, …]` over ranks, this rank's rows of it. Raises when rows do not divide."""
        return self.wait(self.start_reduce_scatter(x))

    def start_reduce_scatter(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        return cast(Tensor, _OPS.reduce_scatter_tensor(x.contiguous(), "sum", self.size, self.name))

    def wait(self, x: Tensor) -> Tensor:
        return x if self.size == 1 else cast(Tensor, _OPS.wait_tensor(x))

    def all_gather(self, x: Tensor) -> Tensor:
        """`[rows, …]` of every rank as `[size * rows, …]`, all alike."""
        return x if self.size == 1 else self.finish_all_gather(self.start_all_gather(x), x.dtype)

    def start_all_gather(self, x: Tensor) -> Tensor:
        return x if self.size == 1 else cast(Tensor, _OPS.all_gather_into_tensor(_plain(x), self.size, self.name))

    def finish_all_gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What was started, as `dtype`."""
        return _as(self.wait(x), dtype)

    def start_gather(self, parts: list[Tensor]) -> Arriving:
        """Send rows to all ranks."""
        return _Gathered(self, parts)

    def gather_columns(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """`[..., widths[rank]]` of every rank side by side: `[..., sum(widths)]`. Widths may differ."""
        if self.size == 1:
            return x
        widest, lead = max(widths), x.shape[:-1]
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[1] < widest:
            flat = torch.nn.functional.pad(flat, (0, widest - flat.shape[1]))
        parts = self.all_gather(flat).view(self.size, -1, widest)
        if min(widths) == widest:
            return parts.transpose(0, 1).reshape(*lead, self.size * widest)
        return torch.cat([parts[r, :, :w] for r, w in enumerate(widths)], -1).view(*lead, sum(widths))

    def gather_rows(self, x: Tensor, heights: Sequence[int]) -> Tensor:
        """`[heights[rank], …]` of every rank, one below the other. Heights may differ, and be zero."""
        if self.size == 1:
            return x
        highest = max(heights)
        if x.shape[0] < highest:
            x = torch.cat([x, x.new_zeros(highest - x.shape[0], *x.shape[1:])])
        every = self.all_gather(x)
        if min(heights) == highest:
            return every
        return torch.cat([every[r * highest : r * highest + h] for r, h in enumerate(heights)])

    def all_to_all(self, x: Tensor, receive: Sequence[int], send: Sequence[int]) -> Tensor:
        """Rows of x to their ranks: the first `send[0]` to rank 0 …; `receive[r]` rows come from rank r."""
        if self.size == 1:
            return x
        y = _OPS.all_to_all_single(_plain(x), list(receive), list(send), self.name)
        return _as(self.wait(y), x.dtype)


class _Gathered(Arriving):
    """By the backend."""

    def __init__(self, group: Group, parts: list[Tensor]) -> None:
        self._group, self._dtypes = group, [part.dtype for part in parts]
        self._parts = [group.start_all_gather(part) for part in parts]

    def whole(self) -> list[Tensor]:
        return [self._group.finish_all_gather(x, d) for x, d in zip(self._parts, self._dtypes, strict=True)]

    def of(self, rank: int) -> list[Tensor]:
        return [_as(_plain(x).chunk(self._group.size)[rank], x.dtype) for x in self.whole()]


def _rounded(x: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    return (x if bias is None else x + bias.float()).to(dtype)


def _plain(x: Tensor) -> Tensor:
    """8-bit floats as bytes, contiguous."""
    x = x.contiguous()
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.view(dtype)
