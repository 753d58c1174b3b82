"""The wide GEMM for sm_90: tokens are wgmma's M. For more tokens than a decode step has.

    y[m, n] = sum over k-blocks of  x_scale[m, kb] * w_scale[n // 128, kb] * (x[m, kb] . w[n, kb])  (+ bias[n])

A program owns one SM. One warp drives TMA for everything that a k-block needs: the tile of x, that of w, and both
kinds of scales, all completing on one mbarrier, so consumers never wait for a global load. Two consumer warpgroups own
64 rows each of a 128-row tile.

Tiles are walked persistently. With STREAM_K the tiles of the last, partial wave are cut along K into equal ranges,
one a program; a tile that a boundary cuts is finished by the last program to arrive, which adds the partial tiles in
program order: same bytes whoever that is.
"""

# mypy: disable-error-code=assignment
# ruff: noqa: SIM102 (compiled by Gluon: branches on constexprs, tuples)
from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .config import Wide, ceil_div, wide_grid
from .device import (
    advance,
    box_start,
    make_barriers,
    partial_offsets,
    partition_barrier,
    scale_boxes,
)
from .launch import Launch, flat, matrix, take_tickets
from .wide_blocks import multiply_steps, plus, zeros

TOGETHER: gl.constexpr = gl.constexpr(8)
"""Tile rows walked together, so that a wave's tiles share operands in L2."""


@gluon.jit
def _tile_origin(tile, num_m, num_n, BM: gl.constexpr, BN: gl.constexpr):
    """First row and column of a tile: groups of TOGETHER tile rows; inside a group along M first, then N."""
    per_group = TOGETHER * num_n
    group = tile // per_group
    first = group * TOGETHER
    rows = gl.minimum(num_m - first, TOGETHER)
    rest = tile % per_group
    return (first + rest % rows) * BM, rest // rows * BN


@gluon.jit
def _first_unit(program, num_tiles, num_steps, full_waves, dealt):
    """Where a program's range of units starts; a unit is one step of a cut tile, dealt to `dealt` programs."""
    units = (num_tiles - full_waves * gl.num_programs(0)) * num_steps
    return gl.minimum(program, dealt) * units // dealt


@gluon.jit
def _owner(unit, num_tiles, num_steps, full_waves, dealt):
    """The program that `unit` is dealt to."""
    units = (num_tiles - full_waves * gl.num_programs(0)) * num_steps
    return ((unit + 1) * dealt - 1) // units


@gluon.jit
def _segments(num_tiles, num_steps, full_waves, dealt, STREAM_K: gl.constexpr):
    """Of this program: (segments, how many of them lie in cut tiles, first unit, end unit)."""
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    if STREAM_K:
        u0 = _first_unit(pid, num_tiles, num_steps, full_waves, dealt)
        u1 = _first_unit(pid + 1, num_tiles, num_steps, full_waves, dealt)
        cut = gl.where(u1 > u0, (u1 - 1) // num_steps - u0 // num_steps + 1, 0)
        return cut + full_waves, cut, u0, u1
    else:
        return (num_tiles - pid + programs - 1) // programs, 0, 0, 0


@gluon.jit
def _segment(i, cut, u0, u1, num_steps, full_waves, STREAM_K: gl.constexpr):
    """(tile, first step, end step) of a program's i-th segment. Cut tiles come first: their sums finish early."""
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    if STREAM_K:
        t = u0 // num_steps + i
        is_cut = i < cut
        s0 = gl.where(is_cut, gl.maximum(u0 - t * num_steps, 0), 0)
        s1 = gl.where(is_cut, gl.minimum(u1 - t * num_steps, num_steps), num_steps)
        tile = gl.where(is_cut, full_waves * programs + t, (i - cut) * programs + pid)
        return tile, s0, s1
    else:
        return pid + i * programs, 0, num_steps


@gluon.jit
def _producer(
    x_desc, w_desc, xs_desc, ws_desc, x_bufs, w_bufs, xs_bufs, ws_bufs, full, empty, xs_ld, ws_ld, num_m, num_n,
    num_steps, full_waves, dealt, GROUPS: gl.constexpr, PIECES: gl.constexpr, SCALE_ROWS: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, STREAM_K: gl.constexpr,
):  # fmt: skip
    """Fill the ring of stages with the operands of every k-block, in the order in which the consumers want them."""
    W: gl.constexpr = w_desc.block_type.shape[0]
    BYTES: gl.constexpr = (
        STEP * (GROUPS * x_desc.block_type.nbytes + PIECES * w_desc.block_type.nbytes + xs_desc.block_type.nbytes)
        + SCALE_ROWS * ws_desc.block_type.nbytes
    )
    count, cut, u0, u1 = _segments(num_m * num_n, num_steps, full_waves, dealt, STREAM_K)
    stage = 0
    phase = 1
    for i in range(count):
        tile, s0, s1 = _segment(i, cut, u0, u1, num_steps, full_waves, STREAM_K)
        m, n = _tile_origin(tile, num_m, num_n, 64 * GROUPS, W * PIECES)
        for kb in range(s0 * STEP, s1 * STEP, STEP):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            for j in gl.static_range(STEP):
                for g in gl.static_range(GROUPS):
                    x = x_bufs.index((stage * STEP + j) * GROUPS + g)
                    tma.async_copy_global_to_shared(x_desc, [m + g * 64, (kb + j) * 128], bar, x)
                for p in gl.static_range(PIECES):
                    w = w_bufs.index((stage * STEP + j) * PIECES + p)
                    tma.async_copy_global_to_shared(w_desc, [n + p * W, (kb + j) * 128], bar, w)
                tma.async_copy_global_to_shared(xs_desc, [(kb + j) * xs_ld + m], bar, xs_bufs.index(stage * STEP + j))
            for r in gl.static_range(SCALE_ROWS):
                at = (n // 128 + r) * ws_ld + kb
                start = box_start(at, ws_desc.dtype)
                tma.async_copy_global_to_shared(ws_desc, [start], bar, ws_bufs.index(stage * SCALE_ROWS + r))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _store(acc, y_desc, y_bufs, slot, bias_ptr, m, n, N, HAS_BIAS: gl.constexpr):
    """Round one `[64, W]` piece of y to its dtype and send it off by TMA, which drops what lies past M and N."""
    if HAS_BIAS:
        col = n + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
        bias = gl.load(bias_ptr + col, mask=col < N, other=0.0).to(gl.float32)
        acc += gl.expand_dims(bias, 0)
    staging = y_bufs.index(slot)
    tma.store_wait(0)
    staging.store(acc.to(y_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [m, n], staging)


@gluon.jit
def _store_halves(acc, y_desc, y_bufs, slot, bias_ptr, m, n, N, HAS_BIAS: gl.constexpr):
    """A 128-wide tile in two steps through a 64-wide staging buffer: the memory saved is one more stage."""
    lo, hi = acc.reshape((64, 2, 64)).permute((0, 2, 1)).split()
    half: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32])
    _store(gl.convert_layout(lo, half), y_desc, y_bufs, slot, bias_ptr, m, n, N, HAS_BIAS)
    _store(gl.convert_layout(hi, half), y_desc, y_bufs, slot, bias_ptr, m, n + 64, N, HAS_BIAS)


@gluon.jit
def _is_last(ticket, parts):
    """Whether this warpgroup is the last of a cut tile's `parts` to arrive. What it wrote before is visible then."""
    partition_barrier()
    last = gl.atomic_add(ticket, 1) == parts - 1
    if last:
        gl.store(ticket, 0)  # as it was found: the next launch starts from zero
    return last


@gluon.jit
def _consumer(
    y_desc, x_bufs, w_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, bias_ptr, workspace, tickets, ws_ld, N, num_m,
    num_n, num_steps, full_waves, dealt, WG: gl.constexpr, GROUPS: gl.constexpr, PIECES: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, U: gl.constexpr, STREAM_K: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG: rows 64 * WG to 64 * WG + 63 of every tile."""
    P: gl.constexpr = w_bufs.shape[1]
    BN: gl.constexpr = P * PIECES
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, P, 32])
    num_tiles = num_m * num_n
    count, cut, u0, u1 = _segments(num_tiles, num_steps, full_waves, dealt, STREAM_K)
    stage = 0
    phase = 0
    for i in range(count):
        tile, s0, s1 = _segment(i, cut, u0, u1, num_steps, full_waves, STREAM_K)
        m, n = _tile_origin(tile, num_m, num_n, 64 * GROUPS, BN)
        m += WG * 64
        at = n // 128 * ws_ld
        odd = n % 128 != 0
        accs = zeros(PIECES, P, mma)
        chunks = (s1 - s0) // U
        for c in range(chunks):
            accs, stage, phase = multiply_steps(accs, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase,
                                                at + (s0 + c * U) * STEP, ws_ld, odd, WG, GROUPS, STEP, U, STAGES,
                                                mma)  # fmt: skip
        for s in range(s0 + chunks * U, s1):
            accs, stage, phase = multiply_steps(accs, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase,
                                                at + s * STEP, ws_ld, odd, WG, GROUPS, STEP, 1, STAGES,
                                                mma)  # fmt: skip
        whole = True
        if STREAM_K:
            if s1 - s0 < num_steps:
                # every program has two slots: 0 for the tile that its range starts in, 1 for the one it ends in
                t = u0 // num_steps + i
                first = _owner(t * num_steps, num_tiles, num_steps, full_waves, dealt)
                last = _owner((t + 1) * num_steps - 1, num_tiles, num_steps, full_waves, dealt)
                offsets = partial_offsets(64, P, mma)
                slot = (2 * gl.program_id(0) + gl.where(i > 0, 1, 0)) * GROUPS + WG
                for p in gl.static_range(PIECES):
                    gl.store(workspace + (slot * PIECES + p) * (64 * P) + offsets, accs[p])
                whole = _is_last(tickets + t * GROUPS + WG, last - first + 1)
                if whole:
                    accs = zeros(PIECES, P, mma)
                    for q in range(first, last + 1):
                        ends_here = _first_unit(q, num_tiles, num_steps, full_waves, dealt) // num_steps != t
                        slot_q = (2 * q + gl.where(ends_here, 1, 0)) * GROUPS + WG
                        accs = plus(accs, workspace + slot_q * (PIECES * 64 * P) + offsets)
        if whole:
            for p in gl.static_range(PIECES):
                if y_desc.block_type.shape[1] < P:
                    _store_halves(accs[p], y_desc, y_bufs, WG, bias_ptr, m, n, N, HAS_BIAS)
                else:
                    _store(accs[p], y_desc, y_bufs, WG, bias_ptr, m, n + p * P, N, HAS_BIAS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["xs_ld", "ws_ld", "M", "N", "num_steps", "full_waves", "dealt"])
def wide_kernel(
    x_desc, w_desc, xs_desc, ws_desc, y_desc, bias_ptr, workspace, tickets, xs_ld, ws_ld, M, N, num_steps, full_waves,
    dealt, GROUPS: gl.constexpr, PIECES: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, U: gl.constexpr,
    STREAM_K: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [M, K], w [N, K] e4m3; xs column-major and ws row-major scales, flat; y [M, N]. num_steps: STEP k-blocks each.

    full_waves: waves of whole tiles; with STREAM_K the tiles past them are cut and dealt to `dealt` programs.
    """
    P: gl.constexpr = w_desc.block_type.shape[0]
    BM: gl.constexpr = 64 * GROUPS
    SCALE_ROWS: gl.constexpr = 2 if PIECES > 1 else 1
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES * STEP * GROUPS, 64, 128], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES * STEP * PIECES, P, 128], w_desc.layout)
    xs_bufs = gl.allocate_shared_memory(gl.float32, [STAGES * STEP, xs_desc.block_type.shape[0]], xs_desc.layout)
    ws_bufs = gl.allocate_shared_memory(
        ws_desc.dtype, [STAGES * SCALE_ROWS, ws_desc.block_type.shape[0]], ws_desc.layout
    )
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [GROUPS, 64, y_desc.block_type.shape[1]], y_desc.layout)
    ws_boxes = scale_boxes(ws_bufs, STAGES * SCALE_ROWS)
    full, empty = make_barriers(STAGES, GROUPS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_m = (M + BM - 1) // BM
    num_n = (N + P * PIECES - 1) // (P * PIECES)
    # the tuples are written out: constexprs do not survive in variables
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (_consumer, (y_desc, x_bufs, w_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, bias_ptr, workspace,
                             tickets, ws_ld, N, num_m, num_n, num_steps, full_waves, dealt,
                             0, GROUPS, PIECES, STEP, STAGES, U,
                             STREAM_K, HAS_BIAS)),
                (_consumer, (y_desc, x_bufs, w_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, bias_ptr, workspace,
                             tickets, ws_ld, N, num_m, num_n, num_steps, full_waves, dealt,
                             1, GROUPS, PIECES, STEP, STAGES, U,
                             STREAM_K, HAS_BIAS)),
                (_consumer, (y_desc, x_bufs, w_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, bias_ptr, workspace,
                             tickets, ws_ld, N, num_m, num_n, num_steps, full_waves, dealt,
                             2, GROUPS, PIECES, STEP, STAGES, U,
                             STREAM_K, HAS_BIAS)),
                (_producer, (x_desc, w_desc, xs_desc, ws_desc, x_bufs, w_bufs, xs_bufs, ws_bufs, full, empty, xs_ld,
                             ws_ld, num_m, num_n, num_steps, full_waves, dealt, GROUPS, PIECES, SCALE_ROWS, STEP,
                             STAGES, STREAM_K)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (y_desc, x_bufs, w_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, bias_ptr, workspace,
                             tickets, ws_ld, N, num_m, num_n, num_steps, full_waves, dealt,
                             0, GROUPS, PIECES, STEP, STAGES, U,
                             STREAM_K, HAS_BIAS)),
                (_consumer, (y_desc, x_bufs, w_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, bias_ptr, workspace,
                             tickets, ws_ld, N, num_m, num_n, num_steps, full_waves, dealt,
                             1, GROUPS, PIECES, STEP, STAGES, U,
                             STREAM_K, HAS_BIAS)),
                (_producer, (x_desc, w_desc, xs_desc, ws_desc, x_bufs, w_bufs, xs_bufs, ws_bufs, full, empty, xs_ld,
                             ws_ld, num_m, num_n, num_steps, full_waves, dealt, GROUPS, PIECES, SCALE_ROWS, STEP,
                             STAGES, STREAM_K)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )  # fmt: skip


def launch(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, y: Tensor, config: Wide, sm_count: int
) -> Launch:
    """Arguments of one launch.

    x: e4m3 [M, K]; x_scale: fp32 [ceil(K / 128), round_up(M, 4)], the storage of column-major scales.
    w: e4m3 [N, K]; w_scale: fp32 [ceil(N / 128), ceil(K / 128)]. y: [M, N], rows at multiples of 16 bytes.
    """
    (m, k), n = x.shape, w.shape[0]
    grid = wide_grid(config, m, n, k, sm_count)
    if grid.cut_tiles:
        workspace = torch.empty(grid.dealt * 2 * 64 * config.groups * config.bn, device=x.device, dtype=torch.float32)
        tickets = take_tickets(x.device, config.groups * (config.tiles(m, n) - grid.full_waves * grid.programs))
    else:
        workspace, tickets = w_scale, w_scale  # unused
    arguments = (
        matrix(x, 64, 128),
        matrix(w, config.piece, 128),
        flat(x_scale, 4 * (256 if config.groups == 3 else 128)),
        flat(w_scale),
        matrix(y, 64, config.staging),
        w_scale if bias is None else bias,
        workspace,
        tickets,
        x_scale.stride(0),
        w_scale.stride(0),
        m,
        n,
        ceil_div(k, 128) // config.step,
        grid.full_waves,
        max(grid.dealt, 1),
    )
    constants = {
        "GROUPS": config.groups,
        "STEP": config.step,
        "PIECES": config.pieces,
        "STAGES": config.stages(y.element_size()),
        "U": config.unroll // config.step,
        "STREAM_K": grid.cut_tiles,
        "HAS_BIAS": bias is not None,
        "PDL": config.pdl,
        "CONSUMER_REGISTERS": 160 if config.groups == 3 else 240,
    }
    options = {"num_warps": 4, "maxnreg": 128 if config.groups == 3 else 168, "launch_pdl": config.pdl}
    return Launch(wide_kernel, (grid.programs,), arguments, constants, options)
