"""2^28 sampled fp32 encodings through the native quantizer, compared byte for byte with the reference. Takes minutes.

    python tests/native/encodings.py [--log2 28]

prints the mismatches of each instruction set and format; exits 1 on any.

Every encoding is `16 i + random(16)`: the samples cover the whole space of 2^32 evenly, NaNs and subnormals included.
The scale is 1, so that what is compared is the rounding itself, as the reference does it.
"""

from __future__ import annotations

import argparse
import sys

import torch

from blockscale import reference
from blockscale.formats import get_format
from blockscale.kernels.cpu import native
from blockscale.registry import Problem

CHUNK = 1 << 22


def mismatches(name: str, log2: int) -> int:
    fmt, one = get_format(name), torch.ones(1, 1)
    problem = Problem("quantize", 0, CHUNK, torch.float32, fmt, out_dtype=torch.float32, static=True)
    step, wrong = 1 << (32 - log2), 0
    for start in range(0, 1 << log2, CHUNK):
        pattern = (torch.arange(start, start + CHUNK) * step + torch.randint(0, step, (CHUNK,))) - (1 << 31)
        x = pattern.to(torch.int32).view(torch.float32)[None]
        got = native.quantize(problem, x, one, 1e-10).data.view(torch.uint8)
        want = reference.quantize(x, fmt, scale=one).data.view(torch.uint8)
        wrong += int((got != want).sum())
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log2", type=int, default=28)
    parser.add_argument("--isa", nargs="*", default=["avx512bf16", "avx2"])
    arguments, failed = parser.parse_args(), 0
    for isa in arguments.isa:
        if native.library().blockscale_use(isa.encode()) != 0:
            print(f"{isa}: not on this processor")
            continue
        for name in ("fp8_tensor", "fp8e5m2_tensor"):
            wrong = mismatches(name, arguments.log2)
            print(f"{isa} {name}: {wrong} of 2^{arguments.log2} encodings differ", flush=True)
            failed += wrong
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
