"""Device functions shared by the Hopper kernels. Gluon code: it runs on the GPU only, never imported by `__init__`.

Vocabulary: a *k-block* is the 128 elements of K that share one activation scale; its partial products come out of
one wgmma and are *promoted*, that is multiplied by both scales and added to the fp32 accumulators (the two-level
sum of the DeepSeek-V3 report, section 3.3.2). A *step* is STEP k-blocks that are loaded, waited for and released
together, and a *stage* the shared memory that they occupy.
"""

# mypy: disable-error-code=assignment
# ruff: noqa: RUF005, SIM108 (compiled by Gluon: tuples)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

# triton 3.7 renamed it
partition_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr, BY: gl.constexpr = 1):
    """The stage BY places on in the ring; the barrier's phase flips when the ring wraps."""
    stage += BY
    wrap = stage >= STAGES
    return gl.where(wrap, stage - STAGES, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def fma_in_order(acc, partial, scale):
    """`acc + partial * scale`, volatile: LLVM would sink plain FMAs below the next wgmma, which keeps one more set of
    accumulators alive and spills."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [partial, scale, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def promote_rows(acc, partial, scale):
    """`acc[m, n] += partial[m, n] * scale[m]`."""
    wide, _ = gl.broadcast(gl.expand_dims(scale, 1), partial)
    return fma_in_order(acc, partial, wide)


@gluon.jit
def promote_cols(acc, partial, scale):
    """`acc[n, m] += partial[n, m] * scale[m]`."""
    wide, _ = gl.broadcast(gl.expand_dims(scale, 0), partial)
    return fma_in_order(acc, partial, wide)


@gluon.jit
def put(items, at: gl.constexpr, item):
    """The tuple `items` with another item at `at`."""
    out = ()
    for i in gl.static_range(len(items)):
        if i == at:
            out = out + (item,)
        else:
            out = out + (items[i],)
    return out


@gluon.jit
def box_start(index, ELEMENT: gl.constexpr):
    """Where the TMA box that holds scale `index` starts: boxes start at multiples of 16 bytes."""
    PER: gl.constexpr = 128 // ELEMENT.primitive_bitwidth
    return index // PER * PER


@gluon.jit
def weight_scale(boxes, slot, index, j: gl.constexpr, layout: gl.constexpr):
    """The weight scale of flat index `index + j` as fp32, from the 128-byte box of `index` that TMA put into `slot`.

    boxes: one element per index, fp32 or E8M0 bytes (0 is 2^-127, 255 is NaN).
    """
    if boxes.dtype == gl.uint8:
        return _decoded(boxes.index(slot * 128 + (index & 15) + j).load(layout))
    else:
        return boxes.index(slot * 32 + (index & 3) + j).load(layout)


@gluon.jit
def load_scale(scales, index):
    """The weight scale of flat index `index` as fp32, straight from memory, where L1 holds its neighbours along K."""
    if scales.dtype.element_ty == gl.uint8:
        return _decoded(gl.load(scales + index))
    else:
        return gl.load(scales + index)


@gluon.jit
def _decoded(codes):
    """E8M0 codes as fp32: 0 is 2^-127, 255 is NaN."""
    byte = codes.to(gl.int32)
    bits = gl.where(byte == 0, 0x00400000, byte << 23)
    return gl.where(byte == 255, 0x7FC00000, bits).to(gl.float32, bitcast=True)


@gluon.jit
def scale_boxes(bufs, COUNT: gl.constexpr):
    """The shared memory of COUNT boxes of weight scales once more, one element per index."""
    PER_BOX: gl.constexpr = bufs.shape[1]
    return bufs._reinterpret(bufs.dtype, [COUNT * PER_BOX, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers of so many arrivals, set up by all warps of the program."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def make_ring(STAGES: gl.constexpr):
    """(full, empty, ready): the bytes that two producers announce complete `full`, an arrival of each consumer
    completes `empty`. `ready` completes when those are set up."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    return full, empty, make_barriers(1, 1)


@gluon.jit
def set_up_ring(full, empty, ready, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """To be called by a partition of one warp: several synchronise after each barrier, which takes 100 cycles."""
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=2)
        mbarrier.init(empty.index(s), count=CONSUMERS)
    fence_async_shared()
    mbarrier.arrive(ready.index(0), count=1)


@gluon.jit
def partial_offsets(ROWS: gl.constexpr, COLS: gl.constexpr, layout: gl.constexpr):
    """Where each element of a `[64, COLS]` wgmma accumulator lies in its workspace tile: threads of a warp adjacent."""
    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), 1)
    col = gl.expand_dims(gl.arange(0, COLS, layout=gl.SliceLayout(0, layout)), 0)
    register = (((row >> 3) & 1) * (COLS // 8) + (col >> 3)) * 2 + (col & 1)
    thread = (row >> 4) * 32 + (row & 7) * 4 + ((col >> 1) & 3)
    return register * 128 + thread
