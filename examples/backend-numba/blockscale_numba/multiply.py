"""The loop. Numba compiles it for the processor at hand when it is first called, and keeps the result on disk."""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(inline="always")
def decode(code):
    """One E4M3 byte as fp32, in integer steps that every vector unit has.

    Shifted by 20 bits, exponent and mantissa land where fp32 has them, with a bias of 127 where E4M3 has 7: a factor of
    2^120, subnormals included (so this needs fp32 subnormals: `torch.set_flush_denormal` must stay off). The sign comes
    along by sign extension. 0x7F and 0xFF are NaN and would read 480: for them alone the sum below carries into bit 7.
    """
    wide = np.int32(np.int8(code))
    nan = ((wide & np.int32(0x7F)) + np.int32(1)) >> np.int32(7)
    bits = np.int32(((wide << np.int32(20)) & np.int32(-0x78100000)) | (nan * np.int32(0x7FC00000)))
    return bits.view(np.float32) * np.float32(2.0**120)


@njit(parallel=True, cache=True, fastmath={"reassoc", "contract"})
def multiply(x, codes, scale, rows, cols, y):
    """`y[m, n] = sum over k of x[m, k] decode(codes[n, k]) scale[n // rows, k // cols]`.

    x: fp32 [M, K]; codes: uint8 [N, K]; scale: fp32 [grid rows, grid cols]; y: fp32 [M, N], written whole.
    fastmath: sums may be taken in any order (the bound allows it); NaN and infinities keep their meaning.
    """
    for n in prange(codes.shape[0]):
        for m in range(x.shape[0]):
            y[m, n] = 0.0
        for block in range(scale.shape[1]):
            start = block * cols
            end = min(start + cols, x.shape[1])
            code = codes[n, start:end]  # slices, not indices: Numba then knows that none is negative, and vectorises
            for m in range(x.shape[0]):
                value = x[m, start:end]
                total = np.float32(0.0)
                for i in range(len(value)):
                    total += value[i] * decode(code[i])
                y[m, n] += total * scale[n // rows, block]
