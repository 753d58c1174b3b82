"""Sums and gathers through shared memory: what they are made of, timed one by one."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from blockscale.errors import BlockscaleError
from blockscale.parallel.direct import DirectGroup
from blockscale.parallel.route import choose
from parallel_clock import Bench, show
from parallel_fit import Direct, fit_direct


def join(b: Bench) -> DirectGroup | None:
    """The group, its large and small sums compared with the backend's; None where it is not to be had."""
    if not b.gpu:
        return None
    try:
        chosen, route = choose("auto", b.device, int(os.environ["LOCAL_WORLD_SIZE"]), "nccl")
        b.say("sums=auto:", route.how, "-", route.reason)
        b.keep("route", {"how": route.how, "reason": route.reason})
        group = chosen if isinstance(chosen, DirectGroup) else DirectGroup(dist.group.WORLD, b.device)
    except BlockscaleError as e:
        b.say("no direct sums:", e)
        return None
    noise = torch.Generator(b.device).manual_seed(b.world.rank)
    for rows in (1, 64, 5, 4097, 4096, 20000):
        x = torch.randn(rows, b.s.hidden, device=b.device, generator=noise)
        want = b.world.tp.all_reduce(x)
        got = group.sum(x.clone(), torch.float32)
        lowest, highest = (b.world.tp.all_reduce(got, op) for op in ("min", "max"))
        if not torch.equal(lowest, highest):
            raise RuntimeError(f"direct sums of {rows} rows differ between ranks")
        if b.world.size == 2 and not torch.equal(got, want):
            raise RuntimeError(f"direct sums of {rows} rows differ from the backend's")
        if not torch.allclose(got, want, rtol=0, atol=1e-5):
            raise RuntimeError(f"direct sums of {rows} rows are wrong")
    b.say("direct sums equal the backend's")
    return group


def parts(b: Bench, group: DirectGroup) -> Direct:
    """Microseconds of a small sum by size; of a barrier, a copy to the next rank, the addition of what arrived."""
    s, memory, share = b.s, group._memory, b.s.prefill[0] // b.world.size
    sums = {f"{rows}": torch.randn(rows, s.hidden, device=b.device) for rows in (1, 4, 16, 64, 128)}
    found = b.us(
        {rows: lambda x=x: group.sum(x, torch.bfloat16) for rows, x in sums.items()},
        repeat=20,
    )
    b.say("direct sums us, by tokens:", show(found))
    b.keep("direct_sum_us", found)
    fitted = fit_direct([(4.0 * int(rows) * s.hidden, us) for rows, us in found.items()], b.world.size)
    x, y = (torch.zeros(share, s.hidden, device=b.device, dtype=t) for t in (torch.float32, torch.bfloat16))
    nearby = memory.view((b.world.rank + 1) % b.world.size, group._slots, x.shape, x.dtype)
    slots = memory.view(b.world.rank, group._slots, (b.world.size * group._slot // 4,), torch.float32)

    def push() -> None:
        with memory.beside():
            nearby.copy_(x)
        memory.join()

    def add() -> None:
        group._kernels.add_arrived(x, slots, y, None, None, b.world.rank, b.world.size, group._slot // 4)

    large = b.us({"barrier": memory.barrier, "push": push, "add": add}, repeat=10)
    large["push GB/s"] = x.numel() * 4 / large["push"] / 1e3
    b.say(f"direct, {share} rows fp32 us:", show(large))
    b.say(f"fit: {fitted.latency_us:.1f} us, {fitted.bytes_per_us / 1e3:.0f} GB/s")
    b.keep("direct_us", large | {"latency_us": fitted.latency_us, "fit_gb_s": fitted.bytes_per_us / 1e3})
    return Direct(fitted.latency_us, fitted.bytes_per_us, x.numel() * 4 / large["push"], large["add"])
