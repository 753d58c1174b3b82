"""Tiles of 192 columns for `wide.py`: a piece of 128 and one of 64, each inside one block of weight scales.

192 divides widths that 128 and 256 columns fill badly (2112, 1536).
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .device import advance, box_start, promote_rows, weight_scale
from .wide_blocks import x_rows
from .wide_store import store
from .wide_tiles import segment, segments, tile_origin


@gluon.jit
def pieces(n):
    """First columns of the 128-wide and of the 64-wide piece of the tile at n; the first is a multiple of 128."""
    aligned = n % 128 == 0
    return gl.where(aligned, n, n + 64), gl.where(aligned, n + 128, n)


@gluon.jit
def fetch_split(w_desc, wq_desc, ws_desc, p_bufs, q_bufs, ws_bufs, bar, stage, n, kb, ws_ld):
    """Send for the weights of one k-block and their scales."""
    n_p, n_q = pieces(n)
    tma.async_copy_global_to_shared(w_desc, [n_p, kb * 128], bar, p_bufs.index(stage))
    tma.async_copy_global_to_shared(wq_desc, [n_q, kb * 128], bar, q_bufs.index(stage))
    start_p = box_start(n_p // 128 * ws_ld + kb, ws_desc.dtype)
    start_q = box_start(n_q // 128 * ws_ld + kb, ws_desc.dtype)
    tma.async_copy_global_to_shared(ws_desc, [start_p], bar, ws_bufs.index(stage * 2))
    tma.async_copy_global_to_shared(ws_desc, [start_q], bar, ws_bufs.index(stage * 2 + 1))


@gluon.jit
def _blocks(
    accs, x_bufs, p_bufs, q_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at_p, at_q, WG: gl.constexpr,
    GROUPS: gl.constexpr, U: gl.constexpr, STAGES: gl.constexpr, mma_p: gl.constexpr, mma_q: gl.constexpr,
):  # fmt: skip
    """U k-blocks of a tile of 192 columns, 128 ("p") and 64 ("q") of them sent off together: one warpgroup promotes
    while another multiplies.

    at_p, at_q: flat index of the first weight scale of each.
    """
    rows_p: gl.constexpr = gl.SliceLayout(1, mma_p)
    rows_q: gl.constexpr = gl.SliceLayout(1, mma_q)
    acc_p, acc_q = accs
    done_p = gl.zeros(acc_p.shape, gl.float32, layout=mma_p)
    done_q = gl.zeros(acc_q.shape, gl.float32, layout=mma_q)
    for i in gl.static_range(U):
        mbarrier.wait(full.index(stage), phase)
        x = x_rows(x_bufs, stage, WG, GROUPS)
        xs = xs_bufs.index(stage).slice(WG * 64, 64)
        scale_p = xs.load(rows_p) * weight_scale(ws_boxes, stage * 2, at_p + i, 0, rows_p)
        scale_q = xs.load(rows_q) * weight_scale(ws_boxes, stage * 2 + 1, at_q + i, 0, rows_q)
        busy_p = warpgroup_mma(x, p_bufs.index(stage).permute((1, 0)), done_p, use_acc=False, is_async=True)
        busy_q = warpgroup_mma(x, q_bufs.index(stage).permute((1, 0)), done_q, use_acc=False, is_async=True)
        done_p = warpgroup_mma_wait(1, deps=(busy_p,))
        acc_p = promote_rows(acc_p, done_p, scale_p)
        done_q = warpgroup_mma_wait(0, deps=(busy_q,))
        mbarrier.arrive(empty.index(stage), count=1)
        acc_q = promote_rows(acc_q, done_q, scale_q)
        stage, phase = advance(stage, phase, STAGES)
    return (acc_p, acc_q), stage, phase


@gluon.jit
def consume_split(
    y_desc, x_bufs, p_bufs, q_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, bias_ptr, ws_ld, N, num_m, num_n, walk,
    num_steps, full_waves, WG: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, U: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG: rows 64 * WG to 64 * WG + 63 of every tile."""
    mma_p: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    mma_q: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32])
    count, cut, u0, u1 = segments(num_m * num_n, num_steps, full_waves, 0, False)
    stage = 0
    phase = 0
    for i in range(count):
        tile = segment(i, cut, u0, u1, num_steps, full_waves, False)[0]
        m, n = tile_origin(tile, num_m, num_n, walk, 64 * GROUPS, 192)
        m += WG * 64
        n_p, n_q = pieces(n)
        at_p = n_p // 128 * ws_ld
        at_q = n_q // 128 * ws_ld
        accs = (gl.zeros((64, 128), gl.float32, layout=mma_p), gl.zeros((64, 64), gl.float32, layout=mma_q))
        chunks = num_steps // U
        for c in range(chunks):
            accs, stage, phase = _blocks(accs, x_bufs, p_bufs, q_bufs, xs_bufs, ws_boxes, full, empty, stage, phase,
                                         at_p + c * U, at_q + c * U, WG, GROUPS, U, STAGES, mma_p, mma_q)  # fmt: skip
        for s in range(chunks * U, num_steps):
            accs, stage, phase = _blocks(accs, x_bufs, p_bufs, q_bufs, xs_bufs, ws_boxes, full, empty, stage, phase,
                                         at_p + s, at_q + s, WG, GROUPS, 1, STAGES, mma_p, mma_q)  # fmt: skip
        store(accs[0], y_desc, y_bufs, bias_ptr, m, n_p, N, 0, WG, GROUPS, HAS_BIAS)
        store(accs[1], y_desc, y_bufs, bias_ptr, m, n_q, N, 2, WG, GROUPS, HAS_BIAS)
    tma.store_wait(0)
