"""What compute-sanitizer is run on: one small launch of a Hopper kernel, or of a kernel that is nothing but a control.

    compute-sanitizer --tool racecheck python bench/racecheck.py bare handed
    compute-sanitizer --tool racecheck python bench/racecheck.py wide-128o-u8-p1-g2-s1-x1-y64

Hazards that a control has too are not the kernel's:
"bare" is Gluon's `warp_specialize` with one store in each partition and a barrier between them: the compiler's dispatch
writes the bytes that waiting warps read. "handed" sets up a barrier in one partition, as `device.set_up_ring` does,
and says so by another one (an arrival, which releases, and a wait, which acquires): racecheck does not follow those.
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from blockscale.kernels.gluon.config import Wide, parse
from blockscale.kernels.gluon.gemm import launch
from blockscale.kernels.gluon.measure import Case, check
from blockscale.platform import detect


@gluon.jit
def _wait_and_store(out, bar):
    mbarrier.wait(bar, 0)
    gl.store(out, 0)


@gluon.jit
def _arrive_and_store(out, bar):
    mbarrier.arrive(bar, count=1)
    gl.store(out + 1, 1)


@gluon.jit
def bare_kernel(out):
    """Two partitions, a store each; one waits for the other. No shared memory but the barrier."""
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    gl.warp_specialize([(_wait_and_store, (out, bar)), (_arrive_and_store, (out, bar))], [1], [24])


@gluon.jit
def _set_up_and_arrive(out, ready, second):
    mbarrier.init(second.index(0), count=1)
    fence_async_shared()
    mbarrier.arrive(ready.index(0), count=1)
    mbarrier.wait(second.index(0), 0)
    gl.store(out, 0)


@gluon.jit
def _wait_and_arrive(out, ready, second):
    mbarrier.wait(ready.index(0), 0)
    mbarrier.arrive(second.index(0), count=1)
    gl.store(out + 1, 1)


@gluon.jit
def _store_alone(out):
    gl.store(out + 2, 2)


@gluon.jit
def handed_kernel(out):
    """One partition sets up a barrier, the other waits until it is told so and arrives at it."""
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    second = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    gl.warp_specialize(
        [
            (_store_alone, (out,)),
            (_set_up_and_arrive, (out, ready, second)),
            (_wait_and_arrive, (out, ready, second)),
        ],
        [1, 1],
        [24, 24],
    )


_CONTROLS = {"bare": (bare_kernel, [0, 1]), "handed": (handed_kernel, [0, 1, 2])}


def main(names: list[str]) -> None:
    sms = int(detect("cuda").value("sms") or 0)
    for name in names:
        if name in _CONTROLS:
            kernel, want = _CONTROLS[name]
            out = torch.full((len(want),), -1, device="cuda", dtype=torch.int32)
            kernel[(8,)](out, num_warps=4, maxnreg=128)
            torch.cuda.synchronize()
            print(name, "right" if out.tolist() == want else f"got {out.tolist()}", flush=True)
        else:
            config = parse(name)
            few = not isinstance(config, Wide) or config.groups == 1  # a box of 16 rows of x
            blocks = config.step * max(4 // config.step, 1 if isinstance(config, Wide) else 2 * config.split)
            case = Case(9 if few else 130, 192, 128 * blocks)
            x, w, y = case.operands(0)
            print(name, check(launch(x, w, None, y, config, sms).run, case) or "right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
