"""The way of a finished tile of `wide.py` into y: rounded, staged in shared memory, sent off by TMA."""

# mypy: disable-error-code=assignment
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma


@gluon.jit
def _store_unit(acc, y_desc, y_bufs, slot, bias_ptr, m, n, N, SLOTS: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Round `[64, W]` of y to its dtype and send it off by TMA, which drops what lies past M and N."""
    if HAS_BIAS:
        col = n + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
        bias = gl.load(bias_ptr + col, mask=col < N, other=0.0).to(gl.float32)
        acc += gl.expand_dims(bias, 0)
    staging = y_bufs.index(slot)
    tma.store_wait(SLOTS - 1)  # what was sent from this slot before has left it
    staging.store(acc.to(y_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [m, n], staging)


@gluon.jit
def store(
    acc, y_desc, y_bufs, bias_ptr, m, n, N, UNIT: gl.constexpr, WG: gl.constexpr, GROUPS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """One piece of y, in units as wide as a slot of the staging buffer. UNIT: units of the tile that came before.

    A warpgroup goes round its slots. With one for each unit of a tile it never waits: it comes back a tile later.
    """
    SLOTS: gl.constexpr = y_bufs.shape[0] // GROUPS
    if acc.shape[1] == y_desc.block_type.shape[1]:
        _store_unit(acc, y_desc, y_bufs, WG * SLOTS + UNIT % SLOTS, bias_ptr, m, n, N, SLOTS, HAS_BIAS)
    else:
        lo, hi = acc.reshape((64, 2, 64)).permute((0, 2, 1)).split()
        half: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32])
        lo = gl.convert_layout(lo, half)
        hi = gl.convert_layout(hi, half)
        _store_unit(lo, y_desc, y_bufs, WG * SLOTS + UNIT % SLOTS, bias_ptr, m, n, N, SLOTS, HAS_BIAS)
        _store_unit(hi, y_desc, y_bufs, WG * SLOTS + (UNIT + 1) % SLOTS, bias_ptr, m, n + 64, N, SLOTS, HAS_BIAS)


@gluon.jit
def leave(accs, p: gl.constexpr, leaving, WG: gl.constexpr, GROUPS: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Piece p of a tile of equal pieces into y.

    leaving: (descriptor of y, staging buffer, bias, N, this warpgroup's first row in the tile, its first column).
    """
    y_desc, y_bufs, bias_ptr, N, m, n = leaving
    P: gl.constexpr = accs[p].shape[1]
    UNIT: gl.constexpr = p * P // y_desc.block_type.shape[1]
    store(accs[p], y_desc, y_bufs, bias_ptr, m, n + p * P, N, UNIT, WG, GROUPS, HAS_BIAS)
