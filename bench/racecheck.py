"""What compute-sanitizer is run on: one small launch of a Hopper kernel, or of a kernel that is nothing but dispatch.

    compute-sanitizer --tool racecheck python bench/racecheck.py bare
    compute-sanitizer --tool racecheck python bench/racecheck.py wide-128o-u8-p1-g2-s1-x1-y64

"bare" is Gluon's `warp_specialize` with one store in each partition and a barrier between them: hazards that are
reported for it are those of the compiler's dispatch, which writes the bytes that waiting warps read.
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

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


def main(names: list[str]) -> None:
    sms = int(detect("cuda").value("sms") or 0)
    for name in names:
        if name == "bare":
            out = torch.full((2,), -1, device="cuda", dtype=torch.int32)
            bare_kernel[(8,)](out, num_warps=4, maxnreg=128)
            torch.cuda.synchronize()
            print(name, "right" if out.tolist() == [0, 1] else f"got {out.tolist()}", flush=True)
        else:
            config = parse(name)
            few = not isinstance(config, Wide) or config.groups == 1  # a box of 16 rows of x
            blocks = config.step * max(4 // config.step, 1 if isinstance(config, Wide) else 2 * config.split)
            case = Case(9 if few else 130, 192, 128 * blocks)
            x, w, y = case.operands(0)
            print(name, check(launch(x, w, None, y, config, sms).run, case) or "right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
