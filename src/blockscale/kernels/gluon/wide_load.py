"""The warp of `wide.py` that fills shared memory by TMA: every operand of a k-block completes one barrier."""

# mypy: disable-error-code=assignment
# ruff: noqa: SIM102 (compiled by Gluon: branches on constexprs)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import advance, box_start
from .wide_split import fetch_split
from .wide_tiles import segment, segments, tile_origin


@gluon.jit
def _fetch_weights(
    w_desc, wq_desc, ws_desc, w_bufs, q_bufs, ws_bufs, full, stage, n, kb, ws_ld, boxes, pred, BYTES: gl.constexpr,
    BOX_BYTES: gl.constexpr, X_BOXES: gl.constexpr, PIECES: gl.constexpr, SCALE_ROWS: gl.constexpr, STEP: gl.constexpr,
    WAY: gl.constexpr,
):  # fmt: skip
    """Announce a step's bytes on its barrier, BYTES and those of `boxes` boxes of x, and send for its weights and their
    scales."""
    W: gl.constexpr = w_desc.block_type.shape[0]
    bar = full.index(stage)
    if X_BOXES == 1:
        mbarrier.expect(bar, BYTES + BOX_BYTES, pred=pred)
    else:  # the number of bytes is a constant
        for b in gl.static_range(1, X_BOXES + 1):
            mbarrier.expect(bar, BYTES + b * BOX_BYTES, pred=(boxes == b) & pred)
    if WAY == "s":
        fetch_split(w_desc, wq_desc, ws_desc, w_bufs, q_bufs, ws_bufs, bar, stage, n, kb, ws_ld, pred)
    else:
        for j in gl.static_range(STEP):
            for p in gl.static_range(PIECES):
                w = w_bufs.index((stage * STEP + j) * PIECES + p)
                tma.async_copy_global_to_shared(w_desc, [n + p * W, (kb + j) * 128], bar, w, pred=pred)
        for r in gl.static_range(SCALE_ROWS):
            start = box_start((n // 128 + r) * ws_ld + kb, ws_desc.dtype)
            ws = ws_bufs.index(stage * SCALE_ROWS + r)
            tma.async_copy_global_to_shared(ws_desc, [start], bar, ws, pred=pred)


@gluon.jit
def produce(
    x_desc, w_desc, wq_desc, xs_desc, ws_desc, x_boxes, w_bufs, q_bufs, xs_bufs, ws_bufs, full, empty, xs_ld, ws_ld,
    M, num_m, num_n, together, num_steps, full_waves, dealt, GROUPS: gl.constexpr, BN: gl.constexpr,
    PIECES: gl.constexpr, SCALE_ROWS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, X_BOXES: gl.constexpr,
    WAY: gl.constexpr, STREAM_K: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Fill the ring of stages with the operands of every k-block, in the order in which the consumers want them.

    EARLY: the first stages' weights are sent for while the kernel before still runs; only what it writes, x, waits.
    X_BOXES: most boxes of x in a tile. Boxes of rows that are not there are not asked for: TMA would write zeros for
    them, row by row, in more time than it takes to read them.
    """
    XROWS: gl.constexpr = x_desc.block_type.shape[0]
    BOXES: gl.constexpr = 64 * GROUPS // XROWS
    BOX_BYTES: gl.constexpr = STEP * x_desc.block_type.nbytes
    BYTES: gl.constexpr = STEP * (BN * 128 + xs_desc.block_type.nbytes) + SCALE_ROWS * ws_desc.block_type.nbytes
    count, cut, u0, u1 = segments(num_m * num_n, num_steps, full_waves, dealt, STREAM_K)
    early = 0
    if EARLY:
        if count > 0:
            tile, s0, s1 = segment(0, cut, u0, u1, num_steps, full_waves, STREAM_K)
            m, n = tile_origin(tile, num_m, num_n, together, 64 * GROUPS, BN)
            early = gl.minimum(s1 - s0, STAGES)
            boxes = gl.minimum((M - m + XROWS - 1) // XROWS, X_BOXES)
            for i in range(early):
                _fetch_weights(w_desc, wq_desc, ws_desc, w_bufs, q_bufs, ws_bufs, full, i, n, (s0 + i) * STEP, ws_ld,
                               boxes, True, BYTES, BOX_BYTES, X_BOXES, PIECES, SCALE_ROWS, STEP, WAY)  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    stage = 0
    phase = 1
    done = 0
    for i in range(count):
        tile, s0, s1 = segment(i, cut, u0, u1, num_steps, full_waves, STREAM_K)
        m, n = tile_origin(tile, num_m, num_n, together, 64 * GROUPS, BN)
        boxes = gl.minimum((M - m + XROWS - 1) // XROWS, X_BOXES)
        for kb in range(s0 * STEP, s1 * STEP, STEP):
            mbarrier.wait(empty.index(stage), phase)
            _fetch_weights(w_desc, wq_desc, ws_desc, w_bufs, q_bufs, ws_bufs, full, stage, n, kb, ws_ld, boxes,
                           done >= early, BYTES, BOX_BYTES, X_BOXES, PIECES, SCALE_ROWS, STEP, WAY)  # fmt: skip
            bar = full.index(stage)
            for j in gl.static_range(STEP):
                for g in gl.static_range(X_BOXES):
                    x = x_boxes.index((stage * STEP + j) * BOXES + g)
                    asked = True
                    if X_BOXES > 1:
                        asked = g < boxes
                    tma.async_copy_global_to_shared(x_desc, [m + g * XROWS, (kb + j) * 128], bar, x, pred=asked)
                tma.async_copy_global_to_shared(xs_desc, [(kb + j) * xs_ld + m], bar, xs_bufs.index(stage * STEP + j))
            stage, phase = advance(stage, phase, STAGES)
            done += 1
