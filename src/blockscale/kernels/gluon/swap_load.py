"""The warps of `swap.py` that fill shared memory by TMA: one sends for weights, one for the tokens, and every stage's
operands complete one barrier."""

# mypy: disable-error-code=assignment
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import advance, box_start, set_up_ring


@gluon.jit
def produce_weights(
    w_desc, ws_desc, w_bufs, ws_bufs, full, empty, ready, ws_ld, u0, u1, num_m, num_steps, STEP: gl.constexpr,
    STAGES: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Send for the weights of steps u0 to u1 and their scales. WAIT: for the kernel before to end, which may have
    written them."""
    BYTES: gl.constexpr = STEP * w_desc.block_type.nbytes + ws_desc.block_type.nbytes
    set_up_ring(full, empty, ready, STAGES, 1)
    if WAIT:
        gdc_wait()
    stage = 0
    phase = 1
    for tile in range(u0 // num_steps, (u1 - 1) // num_steps + 1):
        n = tile // num_m * 64
        first = tile * num_steps
        for s in range(gl.maximum(u0 - first, 0), gl.minimum(u1 - first, num_steps)):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, BYTES)
            for j in gl.static_range(STEP):
                w = w_bufs.index(stage * STEP + j)
                tma.async_copy_global_to_shared(w_desc, [n, (s * STEP + j) * 128], bar, w)
            start = box_start(n // 128 * ws_ld + s * STEP, ws_desc.dtype)
            tma.async_copy_global_to_shared(ws_desc, [start], bar, ws_bufs.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def produce_x(
    x_desc, xs_desc, x_bufs, xs_bufs, full, empty, ready, xs_ld, u0, u1, num_m, num_steps, TOKENS: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Send for the tokens of steps u0 to u1 and their scales, which the kernel before may write."""
    BYTES: gl.constexpr = STEP * (x_desc.block_type.nbytes + xs_desc.block_type.nbytes)
    mbarrier.wait(ready.index(0), 0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    stage = 0
    phase = 1
    for tile in range(u0 // num_steps, (u1 - 1) // num_steps + 1):
        m = tile % num_m * TOKENS
        first = tile * num_steps
        for s in range(gl.maximum(u0 - first, 0), gl.minimum(u1 - first, num_steps)):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, BYTES)
            for j in gl.static_range(STEP):
                at, kb = stage * STEP + j, s * STEP + j
                tma.async_copy_global_to_shared(x_desc, [m, kb * 128], bar, x_bufs.index(at))
                tma.async_copy_global_to_shared(xs_desc, [kb * xs_ld + m], bar, xs_bufs.index(at))
            stage, phase = advance(stage, phase, STAGES)
