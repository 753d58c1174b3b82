"""The warps of `wide.py` that fill shared memory by TMA: one sends for weights, one for x, and every stage's operands
complete one barrier.

Two, because one is too slow: sending for the four operands of a k-block takes a warp some 350 cycles, as long as a
tile of 128 x 64 takes to multiply it.
"""

# mypy: disable-error-code=assignment
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import advance, box_start, set_up_ring
from .wide_split import fetch_split
from .wide_tiles import segment, segments, tile_origin


@gluon.jit
def produce_weights(
    w_desc, wq_desc, ws_desc, w_bufs, q_bufs, ws_bufs, full, empty, ready, ws_ld, num_m, num_n, walk, num_steps,
    full_waves, dealt, GROUPS: gl.constexpr, BN: gl.constexpr, PIECES: gl.constexpr, SCALE_ROWS: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, WAY: gl.constexpr, STREAM_K: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Send for the weights of every step and their scales, in the order in which the consumers want them.

    WAIT: for the kernel before to end, which may have written them.
    """
    W: gl.constexpr = w_desc.block_type.shape[0]
    BYTES: gl.constexpr = STEP * BN * 128 + SCALE_ROWS * ws_desc.block_type.nbytes
    set_up_ring(full, empty, ready, STAGES, GROUPS)
    if WAIT:
        gdc_wait()
    count, cut, u0, u1 = segments(num_m * num_n, num_steps, full_waves, dealt, STREAM_K)
    stage = 0
    phase = 1
    for i in range(count):
        tile, s0, s1 = segment(i, cut, u0, u1, num_steps, full_waves, STREAM_K)
        n = tile_origin(tile, num_m, num_n, walk, 64 * GROUPS, BN)[1]
        for kb in range(s0 * STEP, s1 * STEP, STEP):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, BYTES)
            if WAY == "s":
                fetch_split(w_desc, wq_desc, ws_desc, w_bufs, q_bufs, ws_bufs, bar, stage, n, kb, ws_ld)
            else:
                for j in gl.static_range(STEP):
                    for p in gl.static_range(PIECES):
                        w = w_bufs.index((stage * STEP + j) * PIECES + p)
                        tma.async_copy_global_to_shared(w_desc, [n + p * W, (kb + j) * 128], bar, w)
                for r in gl.static_range(SCALE_ROWS):
                    start = box_start((n // 128 + r) * ws_ld + kb, ws_desc.dtype)
                    tma.async_copy_global_to_shared(ws_desc, [start], bar, ws_bufs.index(stage * SCALE_ROWS + r))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def produce_x(
    x_desc, xs_desc, x_boxes, xs_bufs, full, empty, ready, xs_ld, M, num_m, num_n, walk, num_steps, full_waves,
    dealt, GROUPS: gl.constexpr, BN: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, X_BOXES: gl.constexpr,
    STREAM_K: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Send for the rows of x of every step and their scales, which the kernel before may write.

    X_BOXES: most boxes of x in a tile. Boxes of rows that are not there are not asked for: TMA would write zeros for
    them, row by row, in more time than it takes to read them.
    """
    XROWS: gl.constexpr = x_desc.block_type.shape[0]
    BOXES: gl.constexpr = 64 * GROUPS // XROWS
    BOX_BYTES: gl.constexpr = STEP * x_desc.block_type.nbytes
    BYTES: gl.constexpr = STEP * xs_desc.block_type.nbytes
    count, cut, u0, u1 = segments(num_m * num_n, num_steps, full_waves, dealt, STREAM_K)
    mbarrier.wait(ready.index(0), 0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    stage = 0
    phase = 1
    for i in range(count):
        tile, s0, s1 = segment(i, cut, u0, u1, num_steps, full_waves, STREAM_K)
        m = tile_origin(tile, num_m, num_n, walk, 64 * GROUPS, BN)[0]
        boxes = gl.minimum((M - m + XROWS - 1) // XROWS, X_BOXES)
        for kb in range(s0 * STEP, s1 * STEP, STEP):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            if X_BOXES == 1:
                mbarrier.expect(bar, BYTES + BOX_BYTES)
            else:  # the number of bytes is a constant
                for b in gl.static_range(1, X_BOXES + 1):
                    mbarrier.expect(bar, BYTES + b * BOX_BYTES, pred=boxes == b)
            for j in gl.static_range(STEP):
                for g in gl.static_range(X_BOXES):
                    x = x_boxes.index((stage * STEP + j) * BOXES + g)
                    asked = True
                    if X_BOXES > 1:
                        asked = g < boxes
                    tma.async_copy_global_to_shared(x_desc, [m + g * XROWS, (kb + j) * 128], bar, x, pred=asked)
                tma.async_copy_global_to_shared(xs_desc, [(kb + j) * xs_ld + m], bar, xs_bufs.index(stage * STEP + j))
            stage, phase = advance(stage, phase, STAGES)
