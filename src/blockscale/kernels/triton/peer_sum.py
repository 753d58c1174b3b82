"""Sums over GPUs that read each other's memory: small ones in one launch, large ones after their addends have arrived.

Not kernels of the registry: `parallel.direct` launches them. `addresses` is an int64 tensor with the address, in this
process, of every rank's shared memory. All ranks add in the order of their numbers, so they get the same bits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_BYTES = 8192
"""Of addends that one program takes. The same for every dtype, so that a program's places never move (`sum_kernel`)."""
_ROWS = 4096
"""Elements that one program of `add_kernel` takes."""


@triton.jit
def sum_kernel(
    x_ptr, y_ptr, bias_ptr, addresses, counters, numel, width,
    FLAGS: tl.constexpr, PLACES: tl.constexpr, SLOT: tl.constexpr,
    RANK: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Push x to every rank, raise a flag there, wait for theirs, add, round once.

    A program has its own places: two slots for each source, taken in turns, and one flag that holds the number of the
    call. Slot and number come from `counters`, on the device, so that a captured graph can be replayed. A slot is free
    again when its next turn comes: this rank has seen the flag of the turn between, which the other rank raised after
    its kernel for the turn before had ended.
    SLOT: bytes of a slot. FLAGS: bytes before the flags, PLACES for each source.
    """
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    call = tl.load(counters + program) + 1
    turn = (call & 1) * WORLD
    dtype = x_ptr.dtype.element_ty
    mine = tl.load(x_ptr + at, mask=inside, other=0.0)
    for step in tl.static_range(1, WORLD):
        base = tl.load(addresses + (RANK + step) % WORLD) + (turn + RANK) * SLOT
        tl.store(tl.multiple_of(base.to(tl.pointer_type(dtype)), 16) + at, mine, mask=inside)
    tl.debug_barrier()  # every thread's share is written before one of them says so
    for step in tl.static_range(1, WORLD):
        base = tl.load(addresses + (RANK + step) % WORLD) + FLAGS
        tl.atomic_xchg(base.to(tl.pointer_type(tl.int32)) + RANK * PLACES + program, call, sem="release", scope="sys")
    here = tl.load(addresses + RANK)
    for step in tl.static_range(1, WORLD):
        flag = (here + FLAGS).to(tl.pointer_type(tl.int32)) + (RANK + step) % WORLD * PLACES + program
        while tl.atomic_add(flag, 0, sem="acquire", scope="sys") < call:
            pass
    tl.debug_barrier()
    total = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(WORLD):
        if source == RANK:
            total += mine.to(tl.float32)
        else:
            slot = tl.multiple_of((here + (turn + source) * SLOT).to(tl.pointer_type(dtype)), 16)
            total += tl.load(slot + at, mask=inside, other=0.0, volatile=True).to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + at % width, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(counters + program, call)


@triton.jit
def add_kernel(
    x_ptr, slots_ptr, y_ptr, again_ptr, bias_ptr, numel, width, slot,
    RANK: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """This rank's addend and those in its slots (`slot` elements apart, by source), rounded once; written twice."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    total = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(WORLD):
        if source == RANK:
            part = tl.load(x_ptr + at, mask=inside, other=0.0)
        else:
            part = tl.load(slots_ptr + slot * source + at, mask=inside, other=0.0)
        total += part.to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + at % width, mask=inside, other=0.0).to(tl.float32)
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=inside)
    if AGAIN:
        tl.store(again_ptr + at, y, mask=inside)


def sum_small(
    x: Tensor, y: Tensor, bias: Tensor | None, addresses: Tensor, counters: Tensor, rank: int, *,
    slot_bytes: int, flags: int,
) -> None:  # fmt: skip
    """`y = sum over ranks of x (+ bias)`: x, y `[rows, width]`, contiguous; at most `slot_bytes` of x.

    counters: int32, a number for each program, zero at first. flags: where they begin in the shared memory, in bytes.
    Every rank must make the same calls in the same order.
    """
    block = BLOCK_BYTES // x.element_size()
    launch: Any = sum_kernel[(triton.cdiv(x.numel(), block),)]
    launch(
        x, y, bias, addresses, counters, x.numel(), x.shape[-1], flags, slot_bytes // BLOCK_BYTES, slot_bytes, rank,
        addresses.numel(), block, bias is not None, num_warps=8,
    )  # fmt: skip


def add_arrived(
    x: Tensor, slots: Tensor, y: Tensor, again: Tensor | None, bias: Tensor | None, rank: int, ranks: int, slot: int
) -> None:
    """`y = again = x + what lies in the slots (+ bias)`. slots: where they begin; slot: elements to the next one."""
    launch: Any = add_kernel[(triton.cdiv(x.numel(), _ROWS),)]
    launch(
        x, slots, y, again, bias, x.numel(), x.shape[-1], slot, rank, ranks, _ROWS, bias is not None,
        again is not None, num_warps=8,
    )  # fmt: skip


def counters(slot_bytes: int, device: torch.device) -> Tensor:
    """For `sum_small`."""
    return torch.zeros(slot_bytes // BLOCK_BYTES, dtype=torch.int32, device=device)
