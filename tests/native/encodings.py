"""2^28 sampled fp32 encodings through the native quantizer, compared byte for byte with the reference. Takes minutes.

    python tests/native/encodings.py [--log2 28]

prints the mismatches of each instruction set and format; exits 1 on any.

Every encoding is `16 i + random(16)`: the samples cover the whole space of 2^32 evenly, NaNs and subnormals included.
The scale is 1, so that what is compared is the rounding itself, as the reference does it: once given, so that every
encoding goes in as it is, and once found, from groups whose largest element is the format's (what exceeds that becomes
it).
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


def mismatches(element: str, log2: int) -> tuple[int, int]:
    """How many codes differ with a given scale and with one that the quantizer finds."""
    given, found = get_format(f"{element}_tensor"), get_format(f"{element}_1x128")
    one, largest = torch.ones(1, 1), given.element.max
    static, dynamic = (
        Problem("quantize", 0, CHUNK, torch.float32, fmt, out_dtype=torch.float32, static=fmt is given)
        for fmt in (given, found)
    )
    step, wrong = 1 << (32 - log2), [0, 0]
    for start in range(0, 1 << log2, CHUNK):
        pattern = (torch.arange(start, start + CHUNK) * step + torch.randint(0, step, (CHUNK,))) - (1 << 31)
        x = pattern.to(torch.int32).view(torch.float32)[None]
        want = reference.quantize(x, given, scale=one).data.view(torch.uint8)
        wrong[0] += int((native.quantize(static, x, one, 1e-10).data.view(torch.uint8) != want).sum())
        bounded = x.abs() <= largest
        x = torch.where(bounded, x, largest)
        x[:, ::128] = largest
        got = native.quantize(dynamic, x, None, 1e-10)
        assert bool((got.scale == 1).all())
        bounded[:, ::128] = False
        wrong[1] += int(((got.data.view(torch.uint8) != want) & bounded).sum())
    return wrong[0], wrong[1]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log2", type=int, default=28)
    parser.add_argument("--isa", nargs="*", default=["avx512bf16", "avx2"])
    arguments, failed = parser.parse_args(), 0
    for isa in arguments.isa:
        if native.library().blockscale_use(isa.encode()) != 0:
            print(f"{isa}: not on this processor")
            continue
        for element in ("fp8", "fp8e5m2"):
            wrong = mismatches(element, arguments.log2)
            print(f"{isa} {element}: {wrong} of 2^{arguments.log2} encodings differ (scale given, found)", flush=True)
            failed += sum(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
