"""The swapped GEMM for sm_90: weight rows are wgmma's M, tokens its N. For a decode step.

The same sum as `wide.py`. With few tokens the time is that of reading the weights, so what counts is that every SM
has enough bytes in flight and that no warpgroup waits long: tiles are 64 weight rows, K is split so that the programs
fill the GPU, and inside a program two warpgroups may share the steps of a tile.

The steps of all tiles are cut into contiguous ranges: `SPLIT` equal parts of every tile, or, with SPLIT = 0, equal
ranges over all tiles, one a program. A tile that a boundary cuts is finished by the last program to arrive, which adds
the partial tiles in program order: same bytes whoever that is, in one launch.
"""

# mypy: disable-error-code=assignment
# ruff: noqa: SIM102, SIM113 (compiled by Gluon: branches on constexprs, no enumerate)
from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .config import Swap, ceil_div
from .device import (
    advance,
    make_barriers,
    make_ring,
    partial_offsets,
    partition_barrier,
    promote_cols,
    scale_boxes,
    weight_scale,
)
from .launch import Launch, flat, matrix, partial_tiles, take_tickets
from .swap_load import produce_weights, produce_x


@gluon.jit
def _first_unit(program, units, num_steps, SPLIT: gl.constexpr):
    """First unit (tile * num_steps + step) of a program."""
    if SPLIT == 0:
        return program * units // gl.num_programs(0)
    else:
        return program // SPLIT * num_steps + program % SPLIT * num_steps // SPLIT


@gluon.jit
def _blocks(
    acc, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase, at, GROUPS: gl.constexpr,
    TOKENS: gl.constexpr, STEP: gl.constexpr, U: gl.constexpr, STAGES: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Every GROUPS-th of U * GROUPS steps. at: flat index of the first one's weight scale.

    Two sets of partial products alternate and nothing is in flight when it returns (see wide.py).
    """
    cols: gl.constexpr = gl.SliceLayout(0, mma)
    spare = gl.zeros((64, TOKENS), gl.float32, layout=mma)
    busy = spare
    scale = gl.zeros((TOKENS,), gl.float32, layout=cols)
    held = stage
    for u in gl.static_range(U):
        mbarrier.wait(full.index(stage), phase)
        for j in gl.static_range(STEP):
            x = x_bufs.index(stage * STEP + j).permute((1, 0))
            started = warpgroup_mma(w_bufs.index(stage * STEP + j), x, spare, use_acc=False, is_async=True)
            started_scale = xs_bufs.index(stage * STEP + j).slice(0, TOKENS).load(cols) * weight_scale(
                ws_boxes, stage, at + u * GROUPS * STEP, j, cols
            )
            if u + j > 0:
                spare = warpgroup_mma_wait(1, deps=(busy,))
                if j == 0:
                    mbarrier.arrive(empty.index(held), count=1)
                acc = promote_cols(acc, spare, scale)
            busy = started
            scale = started_scale
        held = stage
        stage, phase = advance(stage, phase, STAGES, GROUPS)
    done = warpgroup_mma_wait(0, deps=(busy,))
    mbarrier.arrive(empty.index(held), count=1)
    acc = promote_cols(acc, done, scale)
    return acc, stage, phase


@gluon.jit
def _consumer(
    x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, ready, sums, sum_full, sum_empty, y_ptr, y_ld, bias_ptr, workspace,
    tickets, ws_ld, M, N, u0, u1, units, num_m, num_steps, WG: gl.constexpr, GROUPS: gl.constexpr,
    TOKENS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr, U: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Warpgroup WG: steps WG, WG + GROUPS ... of every segment. Warpgroup 0 adds up and writes y."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 32])
    out: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    SLOTS: gl.constexpr = 1 if SPLIT else 2  # partial tiles that a program may leave
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    offsets = partial_offsets(64, TOKENS, mma)
    tile0 = u0 // num_steps
    mbarrier.wait(ready.index(0), 0)
    handed = 0  # sums handed from the other warpgroups to warpgroup 0 so far
    for tile in range(tile0, (u1 - 1) // num_steps + 1):
        s0 = gl.maximum(u0 - tile * num_steps, 0)
        s1 = gl.minimum(u1 - tile * num_steps, num_steps)
        at = tile // num_m * 64 // 128 * ws_ld
        acc = gl.zeros((64, TOKENS), gl.float32, layout=mma)
        ring = tile * num_steps + s0 - u0 + WG  # this warpgroup's first step, counted from the program's first
        stage = ring % STAGES
        phase = ring // STAGES & 1
        mine = gl.maximum(s1 - s0 - WG + GROUPS - 1, 0) // GROUPS
        chunks = mine // U
        for c in range(chunks):
            first_step = s0 + WG + c * (U * GROUPS)
            acc, stage, phase = _blocks(acc, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase,
                                        at + first_step * STEP, GROUPS, TOKENS, STEP, U, STAGES, mma)  # fmt: skip
        for s in range(s0 + WG + chunks * (U * GROUPS), s1, GROUPS):
            acc, stage, phase = _blocks(acc, x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, stage, phase,
                                        at + s * STEP, GROUPS, TOKENS, STEP, 1, STAGES, mma)  # fmt: skip
        if WG > 0:
            mbarrier.wait(sum_empty.index(WG - 1), (handed & 1) ^ 1)
            sums.index(WG - 1).store(acc)
            partition_barrier()
            mbarrier.arrive(sum_full.index(WG - 1), count=1)
        else:
            for g in gl.static_range(GROUPS - 1):
                mbarrier.wait(sum_full.index(g), handed & 1)
                acc += sums.index(g).load(mma)
                partition_barrier()
                mbarrier.arrive(sum_empty.index(g), count=1)
            whole = True
            if SPLIT != 1:
                if s1 - s0 < num_steps:
                    if SPLIT == 0:
                        first = ((tile * num_steps + 1) * programs - 1) // units
                        last = ((tile + 1) * num_steps * programs - 1) // units
                    else:
                        first = tile * SPLIT
                        last = first + SPLIT - 1
                    slot = pid * SLOTS + gl.where(tile == tile0, 0, SLOTS - 1)
                    gl.store(workspace + slot * (64 * TOKENS) + offsets, acc)
                    partition_barrier()
                    whole = gl.atomic_add(tickets + tile, 1) == last - first
                    if whole:
                        acc = gl.zeros((64, TOKENS), gl.float32, layout=mma)
                        if SPLIT == 0:
                            for q in range(first, last + 1):
                                starts_here = _first_unit(q, units, num_steps, SPLIT) // num_steps == tile
                                slot_q = q * SLOTS + gl.where(starts_here, 0, 1)
                                acc += gl.load(workspace + slot_q * (64 * TOKENS) + offsets, cache_modifier=".cg")
                        else:
                            for p in gl.static_range(SPLIT):  # unrolled: all partial tiles are in flight together
                                part = workspace + (first + p) * (64 * TOKENS)
                                acc += gl.load(part + offsets, cache_modifier=".cg")
                        gl.store(tickets + tile, 0)  # as it was found: the next launch starts from zero
            if whole:
                n = tile // num_m * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, out))
                m = tile % num_m * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, out))
                y = gl.convert_layout(acc, out)
                if HAS_BIAS:
                    y += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
                mask = gl.expand_dims(m < M, 0) & gl.expand_dims(n < N, 1)
                at_y = gl.expand_dims(m.to(gl.int64), 0) * y_ld + gl.expand_dims(n, 1)
                gl.store(y_ptr + at_y, y.to(y_ptr.dtype.element_ty), mask=mask)
        handed += 1


@gluon.jit(do_not_specialize=["xs_ld", "ws_ld", "M", "N", "num_steps"])
def swap_kernel(
    x_desc, w_desc, xs_desc, ws_desc, y_ptr, bias_ptr, workspace, tickets, xs_ld, ws_ld, M, N, num_steps, y_ld,
    TOKENS: gl.constexpr, GROUPS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    U: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [M, K], w [N, K] e4m3; xs column-major and ws row-major scales, flat; y [M, N], rows `y_ld` apart."""
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES * STEP, 64, 128], w_desc.layout)
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES * STEP, TOKENS, 128], x_desc.layout)
    xs_bufs = gl.allocate_shared_memory(gl.float32, [STAGES * STEP, xs_desc.block_type.shape[0]], xs_desc.layout)
    ws_bufs = gl.allocate_shared_memory(ws_desc.dtype, [STAGES, ws_desc.block_type.shape[0]], ws_desc.layout)
    ws_boxes = scale_boxes(ws_bufs, STAGES)
    full, empty, ready = make_ring(STAGES)
    if GROUPS > 1:
        sums = gl.allocate_shared_memory(gl.float32, [GROUPS - 1, 64, TOKENS], gl.SwizzledSharedLayout(2, 2, 4, [1, 0]))
        sum_full = make_barriers(GROUPS - 1, 1)
        sum_empty = make_barriers(GROUPS - 1, 1)
    else:  # never touched
        sums = xs_bufs
        sum_full = full
        sum_empty = empty
    num_m = (M + TOKENS - 1) // TOKENS
    units = (N + 63) // 64 * num_m * num_steps
    u0 = _first_unit(gl.program_id(0), units, num_steps, SPLIT)
    u1 = _first_unit(gl.program_id(0) + 1, units, num_steps, SPLIT)
    # the tuples are written out: constexprs do not survive in variables
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consumer, (x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, ready, sums, sum_full, sum_empty, y_ptr,
                             y_ld, bias_ptr, workspace, tickets, ws_ld, M, N, u0, u1, units, num_m, num_steps, 0,
                             GROUPS, TOKENS, STEP, STAGES, SPLIT, U, HAS_BIAS)),
                (_consumer, (x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, ready, sums, sum_full, sum_empty, y_ptr,
                             y_ld, bias_ptr, workspace, tickets, ws_ld, M, N, u0, u1, units, num_m, num_steps, 1,
                             GROUPS, TOKENS, STEP, STAGES, SPLIT, U, HAS_BIAS)),
                (produce_weights, (w_desc, ws_desc, w_bufs, ws_bufs, full, empty, ready, ws_ld, u0, u1, num_m,
                                   num_steps, STEP, STAGES, PDL and not EARLY)),
                (produce_x, (x_desc, xs_desc, x_bufs, xs_bufs, full, empty, ready, xs_ld, u0, u1, num_m, num_steps,
                             TOKENS, STEP, STAGES, PDL)),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (x_bufs, w_bufs, xs_bufs, ws_boxes, full, empty, ready, sums, sum_full, sum_empty, y_ptr,
                             y_ld, bias_ptr, workspace, tickets, ws_ld, M, N, u0, u1, units, num_m, num_steps, 0,
                             GROUPS, TOKENS, STEP, STAGES, SPLIT, U, HAS_BIAS)),
                (produce_weights, (w_desc, ws_desc, w_bufs, ws_bufs, full, empty, ready, ws_ld, u0, u1, num_m,
                                   num_steps, STEP, STAGES, PDL and not EARLY)),
                (produce_x, (x_desc, xs_desc, x_bufs, xs_bufs, full, empty, ready, xs_ld, u0, u1, num_m, num_steps,
                             TOKENS, STEP, STAGES, PDL)),
            ],
            [1, 1],
            [24, 24],
        )  # fmt: skip


def launch(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, y: Tensor, config: Swap, sm_count: int,
    workspace: Tensor | None = None, early: bool = False,
) -> Launch:  # fmt: skip
    """Arguments of one launch; operands as for `wide.launch`, y with any row distance."""
    (m, k), n = x.shape, w.shape[0]
    programs = config.programs(m, n, k, sm_count)
    parts, tickets = w_scale, w_scale  # unused
    if config.split != 1:
        parts = workspace if workspace is not None else partial_tiles(x.device, config.floats(programs))
        tickets = take_tickets(x.device, config.tiles(m, n))
    arguments = (
        matrix(x, config.tokens, 128),
        matrix(w, 64, 128),
        flat(x_scale, 4 * max(config.tokens, 32)),
        flat(w_scale),
        y,
        w_scale if bias is None else bias,
        parts,
        tickets,
        x_scale.stride(0),
        w_scale.stride(0),
        m,
        n,
        ceil_div(k, 128) // config.step,
        y.stride(0),
    )
    cap, consumer_registers = config.registers
    constants = {
        "TOKENS": config.tokens,
        "GROUPS": config.groups,
        "STEP": config.step,
        "STAGES": config.stages,
        "SPLIT": config.split,
        "U": config.unroll // config.step,
        "HAS_BIAS": bias is not None,
        "PDL": config.pdl,
        "EARLY": config.pdl and early,
        "CONSUMER_REGISTERS": consumer_registers,
    }
    options = {"num_warps": 4, "maxnreg": cap, "launch_pdl": config.pdl}
    return Launch(swap_kernel, (programs,), arguments, constants, options)
