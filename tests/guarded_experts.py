"""A decode step of experts whose unchosen weights lie in pages that nobody may read: one touched byte ends the process.

Run by test_experts.py in a process of its own; with the argument "chosen" it also forbids a chosen expert.
"""

import ctypes
import mmap
import sys
from dataclasses import replace

import torch

from blockscale import nn, quantize

E, INNER, K, CHOSEN = 6, 1024, 1024, (1, 4)
LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(stacked: torch.Tensor, forbidden: set[int]) -> torch.Tensor:
    """The same bytes `[E, …]` in memory of its own; those of the forbidden experts cannot be read."""
    raw = stacked.reshape(-1).view(torch.uint8)
    each = raw.numel() // E
    assert each % mmap.PAGESIZE == 0, f"{each} bytes of one expert are not whole pages"
    pages = torch.frombuffer(mmap.mmap(-1, raw.numel()), dtype=torch.uint8)
    pages.copy_(raw)
    for expert in forbidden:
        address = ctypes.c_void_p(pages.data_ptr() + expert * each)
        assert LIBC.mprotect(address, ctypes.c_size_t(each), 0) == 0, ctypes.get_errno()
    return pages.view(stacked.dtype).reshape(stacked.shape)


def stack(fmt: str, n: int, k: int, forbidden: set[int]):
    w = quantize(torch.randn(E, n, k), fmt)
    return replace(w, data=guarded(w.data, forbidden), scale=guarded(w.scale, forbidden))


def main() -> None:
    forbidden = set(range(E)) - set(CHOSEN) | ({CHOSEN[0]} if "chosen" in sys.argv else set())
    x, index, weights = torch.randn(1, K), torch.tensor([CHOSEN]), torch.ones(1, len(CHOSEN))
    for fmt in ("fp8_32x32", "mxfp8", "mxfp4", "nvfp4"):
        gate, up = stack(fmt, INNER, K, forbidden), stack(fmt, INNER, K, forbidden)
        down = stack(fmt, K, INNER, forbidden)
        for numerics in ("weight_only", "checkpoint"):
            for kernel in (None, "reference"):
                y = nn.Experts((gate, up), down, numerics=numerics, kernel=kernel)(x, index, weights)
                assert y.isfinite().all()
                print(fmt, numerics, kernel, flush=True)


if __name__ == "__main__":
    main()
