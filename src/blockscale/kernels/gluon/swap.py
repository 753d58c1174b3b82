"""The swapped GEMM for sm_90: weight rows are wgmma's M, tokens its N. For a decode step.

The same sum as `wide.py`. With few tokens the time is that of reading the weights, so what counts is that every SM
has enough bytes in flight: tiles are 64 or 128 weight rows, and K is split so that the programs fill the GPU.

The k-blocks of all tiles are cut into contiguous ranges: `SPLIT` equal parts of every tile, or, with SPLIT = 0, equal
ranges over all tiles, one a program. A tile that a boundary cuts is finished by the last program to arrive, which adds
the partial tiles in program order: same bytes whoever that is, in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .config import Swap, ceil_div
from .device import (
    advance,
    box_start,
    make_barriers,
    partial_offsets,
    partition_barrier,
    promote_cols,
    scale_boxes,
    weight_scale,
)
from .launch import Launch, flat, matrix, take_tickets


@gluon.jit
def _first_unit(program, units, num_kb, SPLIT: gl.constexpr):
    """First unit (tile * num_kb + k-block) of a program."""
    if SPLIT == 0:
        return program * units // gl.num_programs(0)
    else:
        return program // SPLIT * num_kb + program % SPLIT * num_kb // SPLIT


@gluon.jit
def _producer(
    x_desc, w_desc, xs_desc, ws_desc, x_bufs, w_bufs, xs_bufs, ws_bufs, full, empty, xs_ld, ws_ld, u0, u1, num_m,
    num_kb, TOKENS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (
        x_desc.block_type.nbytes + w_desc.block_type.nbytes + xs_desc.block_type.nbytes + ws_desc.block_type.nbytes
    )
    stage = 0
    phase = 1
    for u in range(u0, u1):
        tile = u // num_kb
        kb = u - tile * num_kb
        n = tile // num_m * ROWS
        m = tile % num_m * TOKENS
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        mbarrier.expect(bar, BYTES)
        tma.async_copy_global_to_shared(w_desc, [n, kb * 128], bar, w_bufs.index(stage))
        tma.async_copy_global_to_shared(x_desc, [m, kb * 128], bar, x_bufs.index(stage))
        tma.async_copy_global_to_shared(xs_desc, [kb * xs_ld + m], bar, xs_bufs.index(stage))
        at = n // 128 * ws_ld + kb
        tma.async_copy_global_to_shared(ws_desc, [box_start(at, ws_desc.dtype)], bar, ws_bufs.index(stage))
        stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _start(
    x_bufs, w_bufs, xs_bufs, ws_boxes, full, stage, phase, partial, at, WG: gl.constexpr, TOKENS: gl.constexpr,
    cols: gl.constexpr,
):  # fmt: skip
    """Wait for a k-block and start its products: (products in flight, scale of each token)."""
    mbarrier.wait(full.index(stage), phase)
    w = w_bufs.index(stage).slice(WG * 64, 64)
    partial = warpgroup_mma(w, x_bufs.index(stage).permute((1, 0)), partial, use_acc=False, is_async=True)
    scale = xs_bufs.index(stage).slice(0, TOKENS).load(cols) * weight_scale(ws_boxes, stage, at, cols)
    return partial, scale


@gluon.jit
def _blocks(
    acc, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at, WG: gl.constexpr, TOKENS: gl.constexpr,
    U: gl.constexpr, STAGES: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """U k-blocks; two sets of partial products alternate and nothing is in flight when it returns (see wide.py)."""
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    spare = gl.zeros((64, TOKENS), gl.float32, layout=mma)
    busy, scale = _start(x_bufs, w_bufs, xs_bufs, ws_boxes, full, stage, phase, spare, at, WG, TOKENS, cols)
    held = stage
    stage, phase = advance(stage, phase, STAGES)
    for j in gl.static_range(1, U):
        started, started_scale = _start(x_bufs, w_bufs, xs_bufs, ws_boxes, full, stage, phase, spare, at + j, WG,
                                        TOKENS, cols)  # fmt: skip
        spare = warpgroup_mma_wait(1, deps=(busy,))
        mbarrier.arrive(empty.index(held), count=1)
        acc = promote_cols(acc, spare, scale)
        busy = started
        scale = started_scale
        held = stage
        stage, phase = advance(stage, phase, STAGES)
    done = warpgroup_mma_wait(0, deps=(busy,))
    mbarrier.arrive(empty.index(held), count=1)
    acc = promote_cols(acc, done, scale)
    return acc, stage, phase


@gluon.jit
def _consumer(
    x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, y_ptr, y_ld, bias_ptr, workspace, tickets, ws_ld, M, N, u0, u1,
    units, num_m, num_kb, WG: gl.constexpr, GROUPS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, U: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG: 64 of a tile's weight rows."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 32])
    out: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    SLOTS: gl.constexpr = 1 if SPLIT else 2  # partial tiles that a program may leave
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    offsets = partial_offsets(64, TOKENS, mma)
    stage = 0
    phase = 0
    tile0 = u0 // num_kb
    for tile in range(tile0, (u1 - 1) // num_kb + 1):
        kb0 = gl.maximum(u0 - tile * num_kb, 0)
        kb1 = gl.minimum(u1 - tile * num_kb, num_kb)
        at = tile // num_m * (64 * GROUPS) // 128 * ws_ld
        acc = gl.zeros((64, TOKENS), gl.float32, layout=mma)
        chunks = (kb1 - kb0) // U
        for c in range(chunks):
            acc, stage, phase = _blocks(acc, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase,
                                        at + kb0 + c * U, WG, TOKENS, U, STAGES, mma)  # fmt: skip
        for kb in range(kb0 + chunks * U, kb1):
            acc, stage, phase = _blocks(acc, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at + kb, WG,
                                        TOKENS, 1, STAGES, mma)  # fmt: skip
        whole = True
        if SPLIT != 1:
            if kb1 - kb0 < num_kb:
                if SPLIT == 0:
                    first = ((tile * num_kb + 1) * programs - 1) // units
                    last = ((tile + 1) * num_kb * programs - 1) // units
                else:
                    first = tile * SPLIT
                    last = first + SPLIT - 1
                slot = pid * SLOTS + gl.where(tile == tile0, 0, SLOTS - 1)
                gl.store(workspace + (slot * GROUPS + WG) * (64 * TOKENS) + offsets, acc)
                partition_barrier()
                ticket = tickets + tile * GROUPS + WG
                whole = gl.atomic_add(ticket, 1) == last - first
                if whole:
                    acc = gl.zeros((64, TOKENS), gl.float32, layout=mma)
                    if SPLIT == 0:
                        for q in range(first, last + 1):
                            starts_here = _first_unit(q, units, num_kb, SPLIT) // num_kb == tile
                            slot_q = q * SLOTS + gl.where(starts_here, 0, 1)
                            part = workspace + (slot_q * GROUPS + WG) * (64 * TOKENS)
                            acc += gl.load(part + offsets, cache_modifier=".cg")
                    else:
                        for j in gl.static_range(SPLIT):  # unrolled: all partial tiles are in flight together
                            part = workspace + ((first + j) * GROUPS + WG) * (64 * TOKENS)
                            acc += gl.load(part + offsets, cache_modifier=".cg")
                    gl.store(ticket, 0)  # as it was found: the next launch starts from zero
        if whole:
            n = tile // num_m * (64 * GROUPS) + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, out))
            m = tile % num_m * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, out))
            y = gl.convert_layout(acc, out)
            if HAS_BIAS:
                y += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
            mask = gl.expand_dims(m < M, 0) & gl.expand_dims(n < N, 1)
            at_y = gl.expand_dims(m.to(gl.int64), 0) * y_ld + gl.expand_dims(n, 1)
            gl.store(y_ptr + at_y, y.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["xs_ld", "ws_ld", "M", "N", "num_kb"])
def swap_kernel(
    x_desc, w_desc, xs_desc, ws_desc, y_ptr, bias_ptr, workspace, tickets, xs_ld, ws_ld, M, N, num_kb, y_ld,
    TOKENS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr, U: gl.constexpr,
    HAS_BIAS: gl.constexpr, PDL: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [M, K], w [N, K] e4m3; xs column-major and ws row-major scales as flat fp32; y [M, N], rows `y_ld` apart."""
    ROWS: gl.constexpr = 64 * GROUPS
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, ROWS, 128], w_desc.layout)
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKENS, 128], x_desc.layout)
    xs_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, xs_desc.block_type.shape[0]], xs_desc.layout)
    ws_bufs = gl.allocate_shared_memory(ws_desc.dtype, [STAGES, ws_desc.block_type.shape[0]], ws_desc.layout)
    ws_boxes = scale_boxes(ws_bufs, STAGES)
    full, empty = make_barriers(STAGES, GROUPS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_m = (M + TOKENS - 1) // TOKENS
    units = (N + ROWS - 1) // ROWS * num_m * num_kb
    u0 = _first_unit(gl.program_id(0), units, num_kb, SPLIT)
    u1 = _first_unit(gl.program_id(0) + 1, units, num_kb, SPLIT)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consumer, (x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, y_ptr, y_ld, bias_ptr, workspace, tickets,
                             ws_ld, M, N, u0, u1, units, num_m, num_kb, 0, 2, TOKENS, STAGES, SPLIT, U, HAS_BIAS)),
                (_consumer, (x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, y_ptr, y_ld, bias_ptr, workspace, tickets,
                             ws_ld, M, N, u0, u1, units, num_m, num_kb, 1, 2, TOKENS, STAGES, SPLIT, U, HAS_BIAS)),
                (_producer, (x_desc, w_desc, xs_desc, ws_desc, x_bufs, w_bufs, xs_bufs, ws_bufs, full, empty, xs_ld,
                             ws_ld, u0, u1, num_m, num_kb, TOKENS, ROWS, STAGES)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, y_ptr, y_ld, bias_ptr, workspace, tickets,
                             ws_ld, M, N, u0, u1, units, num_m, num_kb, 0, 1, TOKENS, STAGES, SPLIT, U, HAS_BIAS)),
                (_producer, (x_desc, w_desc, xs_desc, ws_desc, x_bufs, w_bufs, xs_bufs, ws_bufs, full, empty, xs_ld,
                             ws_ld, u0, u1, num_m, num_kb, TOKENS, ROWS, STAGES)),
            ],
            [1],
            [24],
        )  # fmt: skip


def launch(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, y: Tensor, config: Swap, sm_count: int
) -> Launch:
    """Arguments of one launch; operands as for `wide.launch`, y with any row distance."""
    (m, k), n = x.shape, w.shape[0]
    programs = config.programs(m, n, k, sm_count)
    if config.split != 1:
        slots = programs * (1 if config.split else 2) * config.groups
        workspace = torch.empty(slots * 64 * config.tokens, device=x.device, dtype=torch.float32)
        tickets = take_tickets(x.device, config.groups * config.tiles(m, n))
    else:
        workspace, tickets = w_scale, w_scale  # unused
    arguments = (
        matrix(x, config.tokens, 128),
        matrix(w, 64 * config.groups, 128),
        flat(x_scale, 4 * max(config.tokens, 32)),
        flat(w_scale),
        y,
        w_scale if bias is None else bias,
        workspace,
        tickets,
        x_scale.stride(0),
        w_scale.stride(0),
        m,
        n,
        ceil_div(k, 128),
        y.stride(0),
    )
    cap, consumer_registers = config.registers
    constants = {
        "TOKENS": config.tokens,
        "GROUPS": config.groups,
        "STAGES": config.stages,
        "SPLIT": config.split,
        "U": config.unroll,
        "HAS_BIAS": bias is not None,
        "PDL": config.pdl,
        "CONSUMER_REGISTERS": consumer_registers,
    }
    options = {"num_warps": 4, "maxnreg": cap, "launch_pdl": config.pdl}
    return Launch(swap_kernel, (programs,), arguments, constants, options)
