"""The wide GEMM for sm_90: tokens are wgmma's M. For more tokens than a decode step has.

    y[m, n] = sum over k-blocks of  x_scale[m, kb] * w_scale[n // 128, kb] * (x[m, kb] . w[n, kb])  (+ bias[n])

A program owns one SM. Two warps drive TMA for everything that a k-block needs: the tile of x, that of w, and both
kinds of scales, all completing on one mbarrier, so consumers never wait for a global load. Two consumer warpgroups own
64 rows each of a 128-row tile.

Tiles are walked persistently. With STREAM_K the tiles of the last, partial wave are cut along K into equal ranges,
one a program; a tile that a boundary cuts is finished by the last program to arrive, which adds the partial tiles in
program order: same bytes whoever that is.
"""

# mypy: disable-error-code=assignment
# ruff: noqa: SIM108 (compiled by Gluon: branches on constexprs, tuples)
from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .config import Wide, ceil_div, wide_floats, wide_grid
from .device import make_ring, scale_boxes
from .launch import Launch, flat, matrix, partial_tiles, take_tickets
from .wide_consume import consume
from .wide_load import produce_weights, produce_x


@gluon.jit(
    do_not_specialize=[
        "xs_ld",
        "ws_ld",
        "M",
        "N",
        "together",
        "group_inverse",
        "rows_inverse",
        "last_inverse",
        "num_steps",
        "full_waves",
        "dealt",
    ]
)
def wide_kernel(
    x_desc, w_desc, wq_desc, xs_desc, ws_desc, y_desc, ws_ptr, bias_ptr, workspace, tickets, xs_ld, ws_ld, M, N,
    together, group_inverse, rows_inverse, last_inverse, num_steps, full_waves, dealt, GROUPS: gl.constexpr,
    BN: gl.constexpr, PIECES: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, X_BOXES: gl.constexpr,
    U: gl.constexpr, SLOTS: gl.constexpr, WAY: gl.constexpr, STREAM_K: gl.constexpr, SEAM: gl.constexpr,
    BEHIND: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """x [M, K], w [N, K] e4m3; xs column-major and ws row-major scales, flat; y [M, N]. num_steps: STEP k-blocks each.

    together and the inverses: how tiles are walked, see `Wide.walk`. full_waves: waves of whole tiles; with STREAM_K
    the tiles past them are cut and dealt to `dealt` programs.
    """
    P: gl.constexpr = w_desc.block_type.shape[0]
    BM: gl.constexpr = 64 * GROUPS
    SCALE_ROWS: gl.constexpr = 0 if WAY == "l" else 2 if PIECES > 1 else 1
    XROWS: gl.constexpr = x_desc.block_type.shape[0]
    x_boxes = gl.allocate_shared_memory(x_desc.dtype, [STAGES * STEP * BM // XROWS, XROWS, 128], x_desc.layout)
    if GROUPS == 3:  # no power of two
        x_bufs = x_boxes
    else:
        x_bufs = x_boxes._reinterpret(x_desc.dtype, [STAGES * STEP, BM, 128], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES * STEP * (BN // P), P, 128], w_desc.layout)
    xs_bufs = gl.allocate_shared_memory(gl.float32, [STAGES * STEP, xs_desc.block_type.shape[0]], xs_desc.layout)
    if WAY == "s":
        q_bufs = gl.allocate_shared_memory(wq_desc.dtype, [STAGES, BN - P, 128], wq_desc.layout)
    else:
        q_bufs = w_bufs  # never touched
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [GROUPS * SLOTS, 64, y_desc.block_type.shape[1]], y_desc.layout)
    if WAY == "l":
        ws_bufs = xs_bufs  # never touched
        ws_boxes = ws_ptr
    else:
        ws_bufs = gl.allocate_shared_memory(
            ws_desc.dtype, [STAGES * SCALE_ROWS, ws_desc.block_type.shape[0]], ws_desc.layout
        )
        ws_boxes = scale_boxes(ws_bufs, STAGES * SCALE_ROWS)
    full, empty, ready = make_ring(STAGES)
    walk = (together, group_inverse, rows_inverse, last_inverse)
    num_m = (M + BM - 1) // BM
    num_n = (N + BN - 1) // BN
    # the tuples are written out: constexprs do not survive in variables
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (consume, (y_desc, x_bufs, w_bufs, q_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, ready, bias_ptr,
                             workspace, tickets, ws_ld, N, num_m, num_n, walk, num_steps, full_waves, dealt, 0,
                             GROUPS, PIECES, STEP, STAGES, U, WAY, STREAM_K, SEAM, BEHIND, HAS_BIAS)),
                (consume, (y_desc, x_bufs, w_bufs, q_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, ready, bias_ptr,
                             workspace, tickets, ws_ld, N, num_m, num_n, walk, num_steps, full_waves, dealt, 1,
                             GROUPS, PIECES, STEP, STAGES, U, WAY, STREAM_K, SEAM, BEHIND, HAS_BIAS)),
                (consume, (y_desc, x_bufs, w_bufs, q_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, ready, bias_ptr,
                             workspace, tickets, ws_ld, N, num_m, num_n, walk, num_steps, full_waves, dealt, 2,
                             GROUPS, PIECES, STEP, STAGES, U, WAY, STREAM_K, SEAM, BEHIND, HAS_BIAS)),
                (produce_weights, (w_desc, wq_desc, ws_desc, w_bufs, q_bufs, ws_bufs, full, empty, ready, ws_ld, num_m,
                                   num_n, walk, num_steps, full_waves, dealt, GROUPS, BN, PIECES, SCALE_ROWS, STEP,
                                   STAGES, WAY, STREAM_K, PDL and not EARLY)),
                (produce_x, (x_desc, xs_desc, x_boxes, xs_bufs, full, empty, ready, xs_ld, M, num_m, num_n, walk,
                             num_steps, full_waves, dealt, GROUPS, BN, STEP, STAGES, X_BOXES, STREAM_K, PDL)),
            ],
            [4, 4, 1, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24, 24],
        )  # fmt: skip
    elif GROUPS == 1:
        gl.warp_specialize(
            [
                (consume, (y_desc, x_bufs, w_bufs, q_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, ready, bias_ptr,
                             workspace, tickets, ws_ld, N, num_m, num_n, walk, num_steps, full_waves, dealt, 0,
                             GROUPS, PIECES, STEP, STAGES, U, WAY, STREAM_K, SEAM, BEHIND, HAS_BIAS)),
                (produce_weights, (w_desc, wq_desc, ws_desc, w_bufs, q_bufs, ws_bufs, full, empty, ready, ws_ld, num_m,
                                   num_n, walk, num_steps, full_waves, dealt, GROUPS, BN, PIECES, SCALE_ROWS, STEP,
                                   STAGES, WAY, STREAM_K, PDL and not EARLY)),
                (produce_x, (x_desc, xs_desc, x_boxes, xs_bufs, full, empty, ready, xs_ld, M, num_m, num_n, walk,
                             num_steps, full_waves, dealt, GROUPS, BN, STEP, STAGES, X_BOXES, STREAM_K, PDL)),
            ],
            [1, 1],
            [24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (y_desc, x_bufs, w_bufs, q_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, ready, bias_ptr,
                             workspace, tickets, ws_ld, N, num_m, num_n, walk, num_steps, full_waves, dealt, 0,
                             GROUPS, PIECES, STEP, STAGES, U, WAY, STREAM_K, SEAM, BEHIND, HAS_BIAS)),
                (consume, (y_desc, x_bufs, w_bufs, q_bufs, xs_bufs, ws_boxes, y_bufs, full, empty, ready, bias_ptr,
                             workspace, tickets, ws_ld, N, num_m, num_n, walk, num_steps, full_waves, dealt, 1,
                             GROUPS, PIECES, STEP, STAGES, U, WAY, STREAM_K, SEAM, BEHIND, HAS_BIAS)),
                (produce_weights, (w_desc, wq_desc, ws_desc, w_bufs, q_bufs, ws_bufs, full, empty, ready, ws_ld, num_m,
                                   num_n, walk, num_steps, full_waves, dealt, GROUPS, BN, PIECES, SCALE_ROWS, STEP,
                                   STAGES, WAY, STREAM_K, PDL and not EARLY)),
                (produce_x, (x_desc, xs_desc, x_boxes, xs_bufs, full, empty, ready, xs_ld, M, num_m, num_n, walk,
                             num_steps, full_waves, dealt, GROUPS, BN, STEP, STAGES, X_BOXES, STREAM_K, PDL)),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, 24, 24],
        )  # fmt: skip


def launch(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, y: Tensor, config: Wide, sm_count: int,
    workspace: Tensor | None = None, early: bool = False,
) -> Launch:  # fmt: skip
    """Arguments of one launch.

    x: e4m3 [M, K]; x_scale: fp32 [ceil(K / 128), round_up(M, 4)], the storage of column-major scales.
    w: e4m3 [N, K]; w_scale: fp32 [ceil(N / 128), ceil(K / 128)]. y: [M, N], rows at multiples of 16 bytes.
    workspace: fp32, for the partial tiles (`config.floats`); allocated where it is not given.
    early: see `gemm.launch`.
    """
    (m, k), n = x.shape, w.shape[0]
    grid = wide_grid(config, m, n, k, sm_count)
    parts, tickets = w_scale, w_scale  # unused
    if grid.cut_tiles:
        parts = workspace if workspace is not None else partial_tiles(x.device, wide_floats(config, grid))
        tickets = take_tickets(x.device, config.groups * (config.tiles(m, n) - grid.full_waves * grid.programs))
    arguments = (
        matrix(x, config.x_rows(m), 128),
        matrix(w, config.piece, 128),
        matrix(w, config.bn - config.piece if config.way == "s" else config.piece, 128),
        flat(x_scale, 4 * (256 if config.groups == 3 else 64 * config.groups)),
        flat(w_scale),
        matrix(y, 64, config.unit),
        w_scale,
        w_scale if bias is None else bias,
        parts,
        tickets,
        x_scale.stride(0),
        w_scale.stride(0),
        m,
        n,
        *config.walk(m, n),
        ceil_div(k, 128) // config.step,
        grid.full_waves,
        max(grid.dealt, 1),
    )
    cap, consumer_registers = config.registers
    constants = {
        "GROUPS": config.groups,
        "STEP": config.step,
        "BN": config.bn,
        "PIECES": config.pieces,
        "STAGES": config.stages(y.element_size()),
        "X_BOXES": config.x_boxes(m),
        "U": config.unroll // config.step,
        "SLOTS": config.slots,
        "WAY": config.way,
        "STREAM_K": grid.cut_tiles,
        "BEHIND": config.pieces > 1 and config.unroll > config.step,
        "SEAM": config.in_turn and grid.full_waves > 1 and not grid.cut_tiles,
        "HAS_BIAS": bias is not None,
        "PDL": config.pdl,
        "EARLY": config.pdl and config.early and early,
        "CONSUMER_REGISTERS": consumer_registers,
    }
    options = {"num_warps": 4, "maxnreg": cap, "launch_pdl": config.pdl}
    return Launch(wide_kernel, (grid.programs,), arguments, constants, options)
