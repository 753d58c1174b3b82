"""The warp of `swap.py` that fills shared memory by TMA: every operand of a k-block completes one barrier."""

# mypy: disable-error-code=assignment
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import advance, box_start


@gluon.jit
def _fetch_weights(
    w_desc, ws_desc, w_bufs, ws_bufs, full, stage, n, kb, ws_ld, pred, BYTES: gl.constexpr, STEP: gl.constexpr
):
    """Announce a step's bytes on its barrier and send for its weights and their scales."""
    bar = full.index(stage)
    mbarrier.expect(bar, BYTES, pred=pred)
    for j in gl.static_range(STEP):
        w = w_bufs.index(stage * STEP + j)
        tma.async_copy_global_to_shared(w_desc, [n, (kb + j) * 128], bar, w, pred=pred)
    start = box_start(n // 128 * ws_ld + kb, ws_desc.dtype)
    tma.async_copy_global_to_shared(ws_desc, [start], bar, ws_bufs.index(stage), pred=pred)


@gluon.jit
def produce(
    x_desc, w_desc, xs_desc, ws_desc, x_bufs, w_bufs, xs_bufs, ws_bufs, full, empty, xs_ld, ws_ld, u0, u1, num_m,
    num_steps, TOKENS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Fill the ring of stages with the operands of steps u0 to u1.

    EARLY: the first stages' weights are sent for while the kernel before still runs; only what it writes, x, waits.
    """
    BYTES: gl.constexpr = (
        STEP * (x_desc.block_type.nbytes + w_desc.block_type.nbytes + xs_desc.block_type.nbytes)
        + ws_desc.block_type.nbytes
    )
    early = 0
    if EARLY:
        early = gl.minimum(u1 - u0, STAGES)
        for i in range(early):
            u = u0 + i
            tile = u // num_steps
            kb = (u - tile * num_steps) * STEP
            _fetch_weights(w_desc, ws_desc, w_bufs, ws_bufs, full, i, tile // num_m * 64, kb, ws_ld, True, BYTES, STEP)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    stage = 0
    phase = 1
    for u in range(u0, u1):
        tile = u // num_steps
        kb = (u - tile * num_steps) * STEP
        n = tile // num_m * 64
        m = tile % num_m * TOKENS
        mbarrier.wait(empty.index(stage), phase)
        _fetch_weights(w_desc, ws_desc, w_bufs, ws_bufs, full, stage, n, kb, ws_ld, u - u0 >= early, BYTES, STEP)
        bar = full.index(stage)
        for j in gl.static_range(STEP):
            at = stage * STEP + j
            tma.async_copy_global_to_shared(x_desc, [m, (kb + j) * 128], bar, x_bufs.index(at))
            tma.async_copy_global_to_shared(xs_desc, [(kb + j) * xs_ld + m], bar, xs_bufs.index(at))
        stage, phase = advance(stage, phase, STAGES)
