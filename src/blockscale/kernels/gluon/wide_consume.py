"""The consumer warpgroups of `wide.py`: the products of one tile after another, and the tiles' way into y."""

# mypy: disable-error-code=assignment
# ruff: noqa: SIM102 (compiled by Gluon: branches on constexprs)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .device import partial_offsets, partition_barrier
from .wide_blocks import multiply_steps, plus, plus_stored, zeros
from .wide_split import consume_split
from .wide_store import leave
from .wide_tiles import first_unit, owner, segment, segments, tile_origin


@gluon.jit
def _is_last(ticket, parts):
    """Whether this warpgroup is the last of a cut tile's `parts` to arrive. What it wrote before is visible then."""
    partition_barrier()
    last = gl.atomic_add(ticket, 1) == parts - 1
    if last:
        gl.store(ticket, 0)  # as it was found: the next launch starts from zero
    return last


@gluon.jit
def _consume_tiles(
    y_desc, x_bufs, w_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, bias_ptr, workspace, tickets, ws_ld, N, num_m,
    num_n, walk, num_steps, full_waves, dealt, WG: gl.constexpr, GROUPS: gl.constexpr, PIECES: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, U: gl.constexpr, WAY: gl.constexpr, STREAM_K: gl.constexpr,
    SEAM: gl.constexpr, BEHIND: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG: rows 64 * WG to 64 * WG + 63 of every tile.

    SEAM: a tile leaves while the first k-block of the next one is multiplied. BEHIND: see `_blocks_in_turn`.
    """
    P: gl.constexpr = w_bufs.shape[1]
    BN: gl.constexpr = P * PIECES
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, P, 32])
    num_tiles = num_m * num_n
    count, cut, u0, u1 = segments(num_tiles, num_steps, full_waves, dealt, STREAM_K)
    stage = 0
    phase = 0
    total = (count - cut) * num_steps + u1 - u0
    done = 0
    if WAY == "t" or WAY == "l":
        mbarrier.wait(full.index(0), 0, pred=total > 0)
    accs = zeros(PIECES, P, mma)
    m_before = num_m * (64 * GROUPS)  # past all rows: what leaves before the first tile is dropped
    n_before = 0
    for i in range(count):
        tile, s0, s1 = segment(i, cut, u0, u1, num_steps, full_waves, STREAM_K)
        m, n = tile_origin(tile, num_m, num_n, walk, 64 * GROUPS, BN, SEAM)
        m += WG * 64
        at = n // 128 * ws_ld
        start = n % 128
        next_scales = ws_ld
        if WAY == "l":
            next_scales = gl.where(n + 128 < N, ws_ld, 0)  # a piece past N has no scales of its own
        leaving = (y_desc, y_bufs, bias_ptr, N, m_before, n_before)
        if SEAM:
            accs, stage, phase = multiply_steps(accs, leaving, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage,
                                                phase, at, next_scales, start, done, total, WG, GROUPS, STEP, 1,
                                                STAGES, WAY, True, BEHIND, HAS_BIAS, mma)  # fmt: skip
            s0 += 1
            done += 1
            m_before = m
            n_before = n
        else:
            accs = zeros(PIECES, P, mma)
        chunks = (s1 - s0) // U
        for c in range(chunks):
            accs, stage, phase = multiply_steps(accs, leaving, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage,
                                                phase, at + (s0 + c * U) * STEP, next_scales, start, done, total, WG,
                                                GROUPS, STEP, U, STAGES, WAY, False, BEHIND, HAS_BIAS, mma)  # fmt: skip
            done += U
        if U > 1:
            for s in range(s0 + chunks * U, s1):
                accs, stage, phase = multiply_steps(accs, leaving, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty,
                                                    stage, phase, at + s * STEP, next_scales, start, done, total, WG,
                                                    GROUPS, STEP, 1, STAGES, WAY, False, BEHIND, HAS_BIAS,
                                                    mma)  # fmt: skip
                done += 1
        whole = True
        if STREAM_K:
            if s1 - s0 < num_steps:
                # every program has two slots: 0 for the tile that its range starts in, 1 for the one it ends in
                t = u0 // num_steps + i
                first = owner(t * num_steps, num_tiles, num_steps, full_waves, dealt)
                last = owner((t + 1) * num_steps - 1, num_tiles, num_steps, full_waves, dealt)
                offsets = partial_offsets(64, P, mma)
                slot = (2 * gl.program_id(0) + gl.where(i > 0, 1, 0)) * GROUPS + WG
                for p in gl.static_range(PIECES):
                    gl.store(workspace + (slot * PIECES + p) * (64 * P) + offsets, accs[p])
                whole = _is_last(tickets + t * GROUPS + WG, last - first + 1)
                if whole:
                    own = accs
                    accs = zeros(PIECES, P, mma)
                    for q in range(first, last + 1):
                        ends_here = first_unit(q, num_tiles, num_steps, full_waves, dealt) // num_steps != t
                        slot_q = (2 * q + gl.where(ends_here, 1, 0)) * GROUPS + WG
                        part = workspace + slot_q * (PIECES * 64 * P) + offsets
                        if PIECES > 1:  # no registers to hold on to its own part
                            accs = plus_stored(accs, part)
                        elif q == gl.program_id(0):
                            accs = plus(accs, own)
                        else:
                            accs = plus_stored(accs, part)
        if not SEAM:
            if whole:
                for p in gl.static_range(PIECES):
                    leave(accs, p, (y_desc, y_bufs, bias_ptr, N, m, n), WG, GROUPS, HAS_BIAS)
    if SEAM:
        for p in gl.static_range(PIECES):
            leave(accs, p, (y_desc, y_bufs, bias_ptr, N, m_before, n_before), WG, GROUPS, HAS_BIAS)
    tma.store_wait(0)


@gluon.jit
def consume(
    y_desc, x_bufs, w_bufs, q_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, ready, bias_ptr, workspace, tickets, ws_ld,
    N, num_m, num_n, walk, num_steps, full_waves, dealt, WG: gl.constexpr, GROUPS: gl.constexpr,
    PIECES: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, U: gl.constexpr, WAY: gl.constexpr,
    STREAM_K: gl.constexpr, SEAM: gl.constexpr, BEHIND: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG of a program, once its barriers are `ready`."""
    mbarrier.wait(ready.index(0), 0)
    if WAY == "s":
        consume_split(y_desc, x_bufs, w_bufs, q_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, bias_ptr, ws_ld, N, num_m,
                      num_n, walk, num_steps, full_waves, WG, GROUPS, STAGES, U, HAS_BIAS)  # fmt: skip
    else:
        _consume_tiles(y_desc, x_bufs, w_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, bias_ptr, workspace, tickets,
                       ws_ld, N, num_m, num_n, walk, num_steps, full_waves, dealt, WG, GROUPS, PIECES, STEP, STAGES, U,
                       WAY, STREAM_K, SEAM, BEHIND, HAS_BIAS)  # fmt: skip
