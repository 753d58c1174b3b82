"""The inner loop that dense and grouped multiplications share: load, decode, multiply, promote with scales.

Constexprs that recur:

X_KIND, W_KIND: what an operand's bytes are. "value": the pointer's own dtype goes to the dot (fp8 where the chip
multiplies it, or 16- and 32-bit floats); "cast": fp8 that the chip converts to COMPUTE; an element name ("fp8",
"fp8e5m2", "fp8fnuz", "fp4"): bytes that integer code decodes to COMPUTE; "ptx" and "fp4 ptx": E4M3FN and E2M1 bytes
decoded four at a time, which in fp16 leaves a factor (2^-8, 2^-14) that LIFT takes back at the end; "ptx checked":
E4M3FN to fp16 by fewer instructions, where an infinite product can only come of a NaN code.
X_SCALE, W_SCALE: how scales enter. "none"; "loop": they multiply the fp32 partial sum of each K step, outside the
matrix unit, so that its short accumulators do not leak; "fold": groups shorter than a step, whose product with the
element is exact in COMPUTE, multiply the operand; "end": one for all of K, after the loop.
X_GROUP, W_GROUP, W_ROWS: elements of K (and weight rows) that share a scale; 0 is all of them.
SPAN: K elements after which "loop" scales change (0: never). BK divides it, or the last step of a span is masked.
SHUFFLED: x lies in the order of `shuffled`, so decoded weights are brought into it.
SWAP: weight rows take the M side of the matrix instruction, for few tokens on chips where that side is 64 wide.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: SIM108 (branches on constexprs are chosen when a kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl

from .codec import decode, decode_scale, e8m0_as_bf16, unpack_fp4
from .ptx import decode_fp4_ptx, decode_ptx, decode_ptx_checked


@triton.jit
def tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Program number -> (tile row, tile column), GROUP_M tile rows at a time so that operands stay in the L2 cache."""
    per_group = GROUP_M * num_n
    first = pid // per_group * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    inside = pid % per_group
    return first + inside % height, inside // height


@triton.jit
def load_operand(
    ptr,
    row,
    stride,
    k0,
    k_end,
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """`[rows, BK]` of an operand from column k0, zero from k_end on. row: int64 `[rows]`, all of them valid."""
    if KIND == "fp4" or KIND == "fp4 ptx":
        k = k0 // 2 + tl.arange(0, BK // 2)
        k_end = k_end // 2
    else:
        k = k0 + tl.arange(0, BK)
    at = ptr + row[:, None] * stride + k[None, :]
    if EVEN_K:
        raw = tl.load(at)
    else:
        raw = tl.load(at, mask=(k < k_end)[None, :], other=0.0 if KIND == "value" or KIND == "cast" else 0)
    return decoded(raw, KIND, COMPUTE)


@triton.jit
def decoded(raw, KIND: tl.constexpr, COMPUTE: tl.constexpr):
    """What `load_operand` loads, as the matrix unit takes it."""
    if KIND == "value":
        tile = raw
    elif KIND == "cast":
        tile = raw.to(COMPUTE)
    elif KIND == "ptx":
        tile = decode_ptx(raw, COMPUTE)
    elif KIND == "ptx checked":
        tile = decode_ptx_checked(raw)
    elif KIND == "fp4 ptx":
        tile = decode_fp4_ptx(raw, COMPUTE)
    elif KIND == "fp4":
        tile = decode(unpack_fp4(raw), "fp4", COMPUTE)
    else:
        tile = decode(raw, KIND, COMPUTE)
    return tile


@triton.jit
def load_scales(ptr, row, s_row, s_k, k0, k_end, GROUP: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """The stored scales `[rows, BK / GROUP]` of columns k0 … k0 + BK - 1."""
    g = k0 // GROUP + tl.arange(0, BK // GROUP)
    if not EVEN_K:
        # Elements past the end are zeros under any scale, so the last group serves them: triton-xpu 3.3 aborts on
        # the mask of a single group inside a loop.
        g = tl.minimum(g, (k_end - 1) // GROUP)
    return tl.load(ptr + row[:, None] * s_row + g[None, :] * s_k)


@triton.jit
def fold_scale(tile, raw, KIND: tl.constexpr):
    """Multiply `[rows, BK]` by its stored scales `[rows, groups]`."""
    scale = (
        e8m0_as_bf16(raw) if KIND == "e8m0" and tile.dtype == tl.bfloat16 else decode_scale(raw, KIND).to(tile.dtype)
    )
    grouped = tl.reshape(tile, (tile.shape[0], raw.shape[1], tile.shape[1] // raw.shape[1])) * scale[:, :, None]
    return tl.reshape(grouped, (tile.shape[0], tile.shape[1]))


@triton.jit
def shuffled(tile):
    """`[rows, BK]` with each 32 columns in another order: bits ttuhl of a column become uhttl.

    A lane of the matrix unit holds columns 2t, 2t + 1, 2t + 8, 2t + 9 of 16. In this order those of 32 are eight that
    lie side by side in memory: one load instead of four, and registers of four codes as the decoder wants them.
    """
    split = tl.reshape(tile, (tile.shape[0], tile.shape[1] // 32, 4, 2, 2, 2))
    return tl.reshape(tl.permute(split, (0, 1, 3, 4, 2, 5)), (tile.shape[0], tile.shape[1]))


@triton.jit
def group_index(index, GROUP: tl.constexpr):
    """index // GROUP, where 0 means that one group holds everything."""
    return index * 0 if GROUP == 0 else index // GROUP


@triton.jit
def scale_rows(w_row, first, BN: tl.constexpr, W_ROWS: tl.constexpr, W_SCALE: tl.constexpr):
    """Rows of the weight's scale grid for a tile from row `first`: a scalar where one serves all of it."""
    if W_ROWS == 0 or (W_ROWS % BN == 0 and W_SCALE != "fold"):
        row = group_index(first, W_ROWS)
    else:
        row = group_index(w_row, W_ROWS)
    return row


@triton.jit
def count_steps(K, SPAN: tl.constexpr, BK: tl.constexpr):
    """Steps over K, none of which crosses a span."""
    if SPAN == 0 or SPAN % BK == 0:
        steps = tl.cdiv(K, BK)
    else:
        steps = tl.cdiv(K, SPAN) * ((SPAN + BK - 1) // BK)
    return steps


@triton.jit
def step_columns(step, K, SPAN: tl.constexpr, BK: tl.constexpr):
    """Columns of a step: (the first, the end)."""
    if SPAN == 0 or SPAN % BK == 0:
        k0 = step * BK
        k_end = K
    else:
        STEPS: tl.constexpr = (SPAN + BK - 1) // BK
        k0 = step // STEPS * SPAN + step % STEPS * BK
        k_end = tl.minimum(K, (step // STEPS + 1) * SPAN)
    return k0, k_end


@triton.jit
def accumulate(
    x_ptr,
    x_row,
    x_stride,
    sx_ptr,
    sx_m,
    sx_k,
    w_ptr,
    w_row,
    w_stride,
    sw_ptr,
    sw_row,
    sw_n,
    sw_k,
    K,
    first,
    last,
    X_KIND: tl.constexpr,
    W_KIND: tl.constexpr,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    SX_KIND: tl.constexpr,
    SW_KIND: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    SHUFFLED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """fp32 `[BM, BN]` (or `[BN, BM]` with SWAP) of K steps first … last - 1.

    x_row, w_row: int64 row numbers, clipped to what exists: surplus rows are computed and never stored.
    sw_row: row numbers in the weight's scale grid, a vector, or a scalar where one serves the whole tile.
    """
    acc = tl.zeros((BN, BM), tl.float32) if SWAP else tl.zeros((BM, BN), tl.float32)
    # Scales come one step ahead: such short loads are not pipelined, and the decoder would wait for memory. But Triton
    # (3.6, 3.7) then takes decoded E2M1 in groups of 32 through shared memory, which costs more, unless it is shuffled.
    AHEAD: tl.constexpr = (W_KIND != "fp4 ptx" or SHUFFLED) or W_GROUP == 16
    if W_SCALE == "fold" and AHEAD:
        k0, k_end = step_columns(tl.maximum(tl.minimum(first, last - 1), 0), K, SPAN, BK)
        w_scale = load_scales(sw_ptr, sw_row, sw_n, sw_k, k0, k_end, W_GROUP, BK, EVEN_K)
    for step in tl.range(first, last, num_stages=STAGES):
        k0, k_end = step_columns(step, K, SPAN, BK)
        x = load_operand(x_ptr, x_row, x_stride, k0, k_end, X_KIND, COMPUTE, BK, EVEN_K)
        w = load_operand(w_ptr, w_row, w_stride, k0, k_end, W_KIND, COMPUTE, BK, EVEN_K)
        if X_SCALE == "fold":
            x = fold_scale(x, load_scales(sx_ptr, x_row, sx_m, sx_k, k0, k_end, X_GROUP, BK, EVEN_K), SX_KIND)
        if W_SCALE == "fold":
            if not AHEAD:
                w_scale = load_scales(sw_ptr, sw_row, sw_n, sw_k, k0, k_end, W_GROUP, BK, EVEN_K)
            w = fold_scale(w, w_scale, SW_KIND)
            if AHEAD:
                next_k0, next_end = step_columns(tl.minimum(step + 1, last - 1), K, SPAN, BK)
                w_scale = load_scales(sw_ptr, sw_row, sw_n, sw_k, next_k0, next_end, W_GROUP, BK, EVEN_K)
        if SHUFFLED:
            w = shuffled(w)
        if SWAP:
            part = tl.dot(w, tl.trans(x), input_precision="ieee")
        else:
            part = tl.dot(x, tl.trans(w), input_precision="ieee")
        if X_KIND == "ptx checked" or W_KIND == "ptx checked":
            part = tl.fma(part, 0.0, part)  # infinity, which is a NaN code's product, becomes NaN
        if W_SCALE == "loop":
            raw = tl.load(sw_ptr + sw_row * sw_n + group_index(k0, W_GROUP) * sw_k)
            scale = decode_scale(raw, SW_KIND)
            if X_SCALE == "loop":
                x_scale = decode_scale(tl.load(sx_ptr + x_row * sx_m + group_index(k0, X_GROUP) * sx_k), SX_KIND)
                if len(raw.shape) == 0:
                    part *= (x_scale * scale)[None, :] if SWAP else (x_scale * scale)[:, None]
                else:
                    part *= scale[:, None] * x_scale[None, :] if SWAP else x_scale[:, None] * scale[None, :]
            elif len(raw.shape) == 0:
                part *= scale
            else:
                part *= scale[:, None] if SWAP else scale[None, :]
        elif X_SCALE == "loop":
            x_scale = decode_scale(tl.load(sx_ptr + x_row * sx_m + group_index(k0, X_GROUP) * sx_k), SX_KIND)
            part *= x_scale[None, :] if SWAP else x_scale[:, None]
        acc += part
    return acc


@triton.jit
def end_scales(
    acc,
    sx_ptr,
    x_row,
    sx_m,
    sw_ptr,
    sw_row,
    sw_n,
    x_level_ptr,
    w_level_ptr,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    SX_KIND: tl.constexpr,
    SW_KIND: tl.constexpr,
    X_LEVEL: tl.constexpr,
    W_LEVEL: tl.constexpr,
    LIFT: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Scales that serve all of K, and what multiplies every sum alike, on the finished sum."""
    if X_SCALE == "end":
        x_scale = decode_scale(tl.load(sx_ptr + x_row * sx_m), SX_KIND)
        acc *= x_scale[None, :] if SWAP else x_scale[:, None]
    if W_SCALE == "end":
        raw = tl.load(sw_ptr + sw_row * sw_n)
        if len(raw.shape) == 0:
            acc *= decode_scale(raw, SW_KIND)
        else:
            acc *= decode_scale(raw, SW_KIND)[:, None] if SWAP else decode_scale(raw, SW_KIND)[None, :]
    return times_levels(acc, x_level_ptr, w_level_ptr, X_LEVEL, W_LEVEL, LIFT)


@triton.jit
def times_levels(acc, x_level_ptr, w_level_ptr, X_LEVEL: tl.constexpr, W_LEVEL: tl.constexpr, LIFT: tl.constexpr):
    """What multiplies every sum alike: what decoding left (LIFT), and NVFP4's second levels."""
    if LIFT != 1.0:
        acc *= LIFT
    if X_LEVEL:
        acc *= tl.load(x_level_ptr)
    if W_LEVEL:
        acc *= tl.load(w_level_ptr)
    return acc
