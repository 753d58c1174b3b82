"""The inner loops of `wide.py`: a warpgroup's products of several steps, promoted into its fp32 accumulators.

They differ in how the tensor cores are kept busy while partial products are promoted: by a second set of those
(overlapped, rotating) or by another warpgroup (in turn).

SEAM (in turn alone): the accumulators that come in are the tile before's. They are rounded and sent off (`leaving`)
while the first k-block of the new tile is multiplied; otherwise the tensor cores would be idle for as long as two
k-blocks take.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005 (compiled by Gluon: tuples)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .device import advance, load_scale, promote_rows, put, weight_scale
from .wide_store import leave


@gluon.jit
def x_rows(x_bufs, at, WG: gl.constexpr, GROUPS: gl.constexpr):
    """The 64 rows of x of warpgroup WG. at: k-block in the ring. Boxes hold all rows of a tile, or 64 where these are
    no power of two."""
    if GROUPS == 3:
        return x_bufs.index(at * GROUPS + WG)
    else:
        return x_bufs.index(at).slice(WG * 64, 64)


@gluon.jit
def _start(x_bufs, w_bufs, xs_bufs, ws_boxes, stage, at, partial, j: gl.constexpr, WG: gl.constexpr,
           GROUPS: gl.constexpr, STEP: gl.constexpr, rows: gl.constexpr):  # fmt: skip
    """Start the products of a step's j-th k-block, both operands from shared memory: (in flight, scale of each row)."""
    x = x_rows(x_bufs, stage * STEP + j, WG, GROUPS)
    w = w_bufs.index(stage * STEP + j).permute((1, 0))
    partial = warpgroup_mma(x, w, partial, use_acc=False, is_async=True)
    x_scale = xs_bufs.index(stage * STEP + j).slice(WG * 64, 64).load(rows)
    return partial, x_scale * weight_scale(ws_boxes, stage, at, j, rows)


@gluon.jit
def _blocks_overlapped(
    accs, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at, WG: gl.constexpr, GROUPS: gl.constexpr,
    STEP: gl.constexpr, U: gl.constexpr, STAGES: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """U steps of a one-piece tile. at: flat index of the first weight scale.

    Two sets of partial products alternate: one is promoted while the tensor cores work on the other. Nothing is in
    flight when the function returns: a wgmma across a loop's back edge makes ptxas serialise all of them (C7514).
    """
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    acc = accs[0]
    spare = gl.zeros(acc.shape, gl.float32, layout=mma)
    busy = spare
    scale = gl.zeros((64,), gl.float32, layout=rows)
    held = stage
    for u in gl.static_range(U):
        mbarrier.wait(full.index(stage), phase)
        for j in gl.static_range(STEP):
            started, started_scale = _start(x_bufs, w_bufs, xs_bufs, ws_boxes, stage, at + u * STEP, spare, j, WG,
                                            GROUPS, STEP, rows)  # fmt: skip
            if u + j > 0:
                spare = warpgroup_mma_wait(1, deps=(busy,))
                if j == 0:
                    mbarrier.arrive(empty.index(held), count=1)
                acc = promote_rows(acc, spare, scale)
            busy = started
            scale = started_scale
        held = stage
        stage, phase = advance(stage, phase, STAGES)
    done = warpgroup_mma_wait(0, deps=(busy,))
    mbarrier.arrive(empty.index(held), count=1)
    acc = promote_rows(acc, done, scale)
    return (acc,), stage, phase


@gluon.jit
def _scale_row(start, p: gl.constexpr, P: gl.constexpr):
    """The row of weight scales, counted from the tile's first, of piece p. start: the tile's first column, mod 128."""
    if P == 128:
        return p
    else:
        return (start + p * P) // 128


@gluon.jit
def _blocks_rotating(
    accs, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at, ws_ld, start, WG: gl.constexpr,
    GROUPS: gl.constexpr, STEP: gl.constexpr, U: gl.constexpr, STAGES: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """U steps of a tile of several pieces, each with partial products of its own: while one piece is promoted the
    others multiply. Tiles need not be a power of two wide."""
    PIECES: gl.constexpr = len(accs)
    P: gl.constexpr = accs[0].shape[1]
    COUNT: gl.constexpr = U * STEP
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    partials = zeros(PIECES, P, mma)
    scales = zeros_like_rows(PIECES, rows)
    held = stage
    for i in gl.static_range(COUNT + 1):
        if i % STEP == 0 and i < COUNT:
            mbarrier.wait(full.index(stage), phase)
        if i < COUNT:
            x = x_rows(x_bufs, stage * STEP + i % STEP, WG, GROUPS)
        for p in gl.static_range(PIECES):
            if i > 0:
                # in flight: the later pieces of the k-block before, the earlier ones of this
                if i < COUNT:
                    done = warpgroup_mma_wait(PIECES - 1, deps=(partials[p],))
                else:
                    done = warpgroup_mma_wait(PIECES - 1 - p, deps=(partials[p],))
                if p == PIECES - 1 and i % STEP == 0:
                    mbarrier.arrive(empty.index(held), count=1)
                accs = put(accs, p, promote_rows(accs[p], done, scales[p]))
            else:
                done = partials[p]
            if i < COUNT:
                w = w_bufs.index((stage * STEP + i % STEP) * PIECES + p).permute((1, 0))
                partials = put(partials, p, warpgroup_mma(x, w, done, use_acc=False, is_async=True))
                if p == 0:
                    x_scale = xs_bufs.index(stage * STEP + i % STEP).slice(WG * 64, 64).load(rows)
                r = _scale_row(start, p, P)
                scale = x_scale * weight_scale(
                    ws_boxes, stage * 2 + r, at + r * ws_ld + i // STEP * STEP, i % STEP, rows
                )
                scales = put(scales, p, scale)
        if i < COUNT and i % STEP == STEP - 1:
            held = stage
            stage, phase = advance(stage, phase, STAGES)
    return accs, stage, phase


@gluon.jit
def _blocks_in_turn(
    accs, leaving, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at, ws_ld, start, done, total,
    WG: gl.constexpr, GROUPS: gl.constexpr, STEP: gl.constexpr, U: gl.constexpr, STAGES: gl.constexpr,
    WAY: gl.constexpr, SEAM: gl.constexpr, BEHIND: gl.constexpr, HAS_BIAS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """U steps with one set of partial products, piece after piece: one warpgroup promotes while the others multiply.

    The registers saved make room for twice the columns. A step's operands are there when it begins, for each step waits
    for the next one's while its last piece is multiplied: no wait lies between a promotion and the products after it.
    done, total: steps of this program before these, and all of them.

    BEHIND: a step's memory is given back when the next one's first piece is under way, so that no barrier stands
    before that; otherwise at once, so that the ring fills sooner. With U = 1 there is least code: every warpgroup has a
    copy of its own, and the instruction cache has to hold them all.

    WAY "l": weight scales by plain loads, which arrive while the tensor cores work: no shared memory for them, and two
    TMA requests a k-block less. ws_ld: from a piece's scales to the next one's.
    """
    PIECES: gl.constexpr = len(accs)
    P: gl.constexpr = accs[0].shape[1]
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    partial = gl.zeros((64, P), gl.float32, layout=mma)
    for u in gl.static_range(U):
        held = stage
        for j in gl.static_range(STEP):
            x = x_rows(x_bufs, held * STEP + j, WG, GROUPS)
            for p in gl.static_range(PIECES):
                w = w_bufs.index((held * STEP + j) * PIECES + p).permute((1, 0))
                busy = warpgroup_mma(x, w, partial, use_acc=False, is_async=True)
                if p == 0:
                    if WAY == "l":
                        w_scales = ()
                        for q in gl.static_range(PIECES):
                            w_scales = w_scales + (load_scale(ws_boxes, at + u + q * ws_ld),)
                    if BEHIND and j == 0:
                        before = empty.index(gl.where(held == 0, STAGES - 1, held - 1))
                        if u == 0:
                            mbarrier.arrive(before, count=1, pred=done > 0)
                        else:
                            mbarrier.arrive(before, count=1)
                    x_scale = xs_bufs.index(held * STEP + j).slice(WG * 64, 64).load(rows)
                if WAY == "l":
                    scale = x_scale * w_scales[p]
                else:
                    r = _scale_row(start, p, P) if PIECES > 1 else 0
                    slot = held * (2 if PIECES > 1 else 1) + r
                    scale = x_scale * weight_scale(ws_boxes, slot, at + r * ws_ld + u * STEP, j, rows)
                if SEAM and u + j == 0:
                    leave(accs, p, leaving, WG, GROUPS, HAS_BIAS)
                    accs = put(accs, p, gl.zeros((64, P), gl.float32, layout=mma))
                if j == STEP - 1 and p == PIECES - 1:
                    stage, phase = advance(stage, phase, STAGES)
                    if u < U - 1:
                        mbarrier.wait(full.index(stage), phase)
                    else:
                        mbarrier.wait(full.index(stage), phase, pred=done + U < total)
                partial = warpgroup_mma_wait(0, deps=(busy,))
                if not BEHIND and j == STEP - 1 and p == PIECES - 1:
                    mbarrier.arrive(empty.index(held), count=1)
                accs = put(accs, p, promote_rows(accs[p], partial, scale))
    return accs, stage, phase


@gluon.jit
def zeros(COUNT: gl.constexpr, COLS: gl.constexpr, mma: gl.constexpr):
    """A tuple of empty accumulators."""
    out = ()
    for _ in gl.static_range(COUNT):
        out = out + (gl.zeros((64, COLS), gl.float32, layout=mma),)
    return out


@gluon.jit
def zeros_like_rows(COUNT: gl.constexpr, rows: gl.constexpr):
    """A tuple of row vectors."""
    out = ()
    for _ in gl.static_range(COUNT):
        out = out + (gl.zeros((64,), gl.float32, layout=rows),)
    return out


@gluon.jit
def plus(accs, others):
    """Sum of two tuples, piece by piece."""
    out = ()
    for p in gl.static_range(len(accs)):
        out = out + (accs[p] + others[p],)
    return out


@gluon.jit
def plus_stored(accs, part):
    """Add one program's partial tile, pieces one after another in the workspace."""
    out = ()
    for p in gl.static_range(len(accs)):
        out = out + (accs[p] + gl.load(part + p * (64 * accs[p].shape[1]), cache_modifier=".cg"),)
    return out


@gluon.jit
def multiply_steps(
    accs, leaving, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at, ws_ld, start, done, total,
    WG: gl.constexpr, GROUPS: gl.constexpr, STEP: gl.constexpr, U: gl.constexpr, STAGES: gl.constexpr,
    WAY: gl.constexpr, SEAM: gl.constexpr, BEHIND: gl.constexpr, HAS_BIAS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """U steps of a tile, in any WAY of `config.Wide` but "s". at: flat index of the first weight scale.

    SEAM: they are its first, and `accs` the tile before's, on its way into y (`wide_store.leave`); in turn alone.
    """
    if WAY == "o" and len(accs) == 1:
        return _blocks_overlapped(accs, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at, WG, GROUPS,
                                  STEP, U, STAGES, mma)  # fmt: skip
    elif WAY == "o":
        return _blocks_rotating(accs, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at, ws_ld, start,
                                WG, GROUPS, STEP, U, STAGES, mma)  # fmt: skip
    else:
        return _blocks_in_turn(accs, leaving, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at, ws_ld,
                               start, done, total, WG, GROUPS, STEP, U, STAGES, WAY, SEAM, BEHIND, HAS_BIAS,
                               mma)  # fmt: skip
