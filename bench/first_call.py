"""What the first call of a shape costs, and the same in a second process: python bench/first_call.py M,N,K [M,N,K …]

Run it twice with one fresh TRITON_CACHE_DIR: the first process compiles, the second reads Triton's cache.
"""

from __future__ import annotations

import sys
import time

import torch

from blockscale import ops, quantize


def main(shapes: list[str]) -> None:
    for text in shapes:
        m, n, k = map(int, text.split(","))
        w = quantize(torch.randn(n, k, device="cuda"), "fp8_128x128")
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        spans = []
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            ops.linear(x, w)
            torch.cuda.synchronize()
            spans.append(time.perf_counter() - start)
        print(f"{text}: first call {spans[0]:.3f} s, second {spans[1] * 1e6:.0f} us", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
