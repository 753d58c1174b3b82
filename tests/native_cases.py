"""What the tests of the native CPU kernels share: problems, the fp64 definition, the instruction sets that run here."""

import ctypes
import shutil

import pytest
import torch

from blockscale import Platform, reference
from blockscale.kernels.cpu import native
from blockscale.numerics import get_numerics
from blockscale.registry import Problem

NEEDS_LIBRARY = pytest.mark.skipif(
    not native.PATH.exists() and shutil.which("g++") is None, reason="no C++ compiler, so no native library"
)
WEIGHT_ONLY = get_numerics("weight_only")
F32 = torch.float32


def usable() -> list[str]:
    if not native.PATH.exists():
        return ["not built"]
    library = ctypes.CDLL(str(native.PATH))  # by itself, so that collecting tests chooses nothing
    library.blockscale_isa.restype = ctypes.c_char_p
    best = library.blockscale_isa()
    names = [
        n for n in (b"avx512bf16", b"avx512", b"avx2", b"sse2", b"neon", b"generic") if library.blockscale_use(n) == 0
    ]
    library.blockscale_use(best)
    return [n.decode() for n in names]


def problem(w, x, numerics=WEIGHT_ONLY, out=None, op="linear"):
    n, k = w.shape[-2:]
    return Problem(op, n, k, x.dtype, w.format, out_dtype=out or x.dtype, numerics=numerics)


def worst_row(y, want):
    """Largest relative error of a row: a norm over everything would pass with whole rows wrong."""
    return ((y.double() - want).norm(dim=1) / want.norm(dim=1)).max().item()


def exact(x, w, bias, numerics):
    y = reference.activations(x, w, numerics).double() @ reference.dequantize(w).double().T
    return y if bias is None else y + bias.double()


def reasons(kernel, p, platform):
    return list(kernel.why_not(p, Platform.parse(platform)))
