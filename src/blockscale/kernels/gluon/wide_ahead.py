"""The seam between two tiles of `wide.py`: one leaves while the next one's first k-block is multiplied.

The end of a tile, rounding, staging and sending, takes as long as two or three k-blocks. Where it came between the last
product of a tile and the first of the next, the tensor cores had nothing to do meanwhile.
"""

# mypy: disable-error-code=assignment
# ruff: noqa: RUF005 (compiled by Gluon: tuples)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .device import advance, load_scale, promote_rows, put, weight_scale
from .wide_blocks import scale_row, x_rows
from .wide_store import store


@gluon.jit
def start_tile(
    accs, x_bufs, w_bufs, xs_bufs, ws_boxes, y_desc, y_bufs, full, empty, bias_ptr, stage, phase, at, ws_ld, start,
    m_before, n_before, N, WG: gl.constexpr, GROUPS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    SLOTS: gl.constexpr, WAY: gl.constexpr, HAS_BIAS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """The first step of a tile, and the way of `accs`, the tile before at (m_before, n_before), into y.

    Returns the new tile's accumulators, and where the ring stands. at, ws_ld, start: as in `multiply_steps`.
    """
    PIECES: gl.constexpr = len(accs)
    P: gl.constexpr = accs[0].shape[1]
    UNIT: gl.constexpr = y_desc.block_type.shape[1]
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    empty_acc = gl.zeros(accs[0].shape, gl.float32, layout=mma)
    partial = empty_acc
    mbarrier.wait(full.index(stage), phase)
    for j in gl.static_range(STEP):
        x = x_rows(x_bufs, stage * STEP + j, WG, GROUPS)
        for p in gl.static_range(PIECES):
            w = w_bufs.index((stage * STEP + j) * PIECES + p).permute((1, 0))
            busy = warpgroup_mma(x, w, partial, use_acc=False, is_async=True)
            if p == 0:
                x_scale = xs_bufs.index(stage * STEP + j).slice(WG * 64, 64).load(rows)
            if WAY == "l":
                scale = x_scale * load_scale(ws_boxes, at + p * ws_ld)
            else:
                r = scale_row(start, p, P) if PIECES > 1 else 0
                slot = stage * (2 if PIECES > 1 else 1) + r
                scale = x_scale * weight_scale(ws_boxes, slot, at + r * ws_ld, j, rows)
            if j == 0:
                store(accs[p], y_desc, y_bufs, bias_ptr, m_before, n_before + p * P, N, p * P // UNIT, WG, SLOTS,
                      HAS_BIAS)  # fmt: skip
                accs = put(accs, p, empty_acc)
            partial = warpgroup_mma_wait(0, deps=(busy,))
            if j == STEP - 1 and p == PIECES - 1:
                mbarrier.arrive(empty.index(stage), count=1)
            accs = put(accs, p, promote_rows(accs[p], partial, scale))
    stage, phase = advance(stage, phase, STAGES)
    return accs, stage, phase
