"""The way of a finished tile of `wide.py` into y: rounded, staged in shared memory, sent off by TMA."""

# mypy: disable-error-code=assignment
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma


@gluon.jit
def store(acc, y_desc, y_bufs, slot, bias_ptr, m, n, N, HAS_BIAS: gl.constexpr):
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
def store_halves(acc, y_desc, y_bufs, slot, bias_ptr, m, n, N, HAS_BIAS: gl.constexpr):
    """A 128-wide tile in two steps through a 64-wide staging buffer: the memory saved is one more stage."""
    lo, hi = acc.reshape((64, 2, 64)).permute((0, 2, 1)).split()
    half: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32])
    store(gl.convert_layout(lo, half), y_desc, y_bufs, slot, bias_ptr, m, n, N, HAS_BIAS)
    store(gl.convert_layout(hi, half), y_desc, y_bufs, slot, bias_ptr, m, n + 64, N, HAS_BIAS)
