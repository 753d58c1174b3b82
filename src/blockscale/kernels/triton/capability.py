"""Which FP8 instructions a platform has, as Triton reaches them: pure functions of `Platform`.

The table is measured by compiling ahead of time for every target (docs/platforms.md, `bench/aot.py`). Answers are
remembered: eager calls ask a dozen of these questions each.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ...formats import Format
from ...platform import Platform

GROUP_MAX = 4096
"""Groups up to this many elements are one tile; wider ones and blocks of rows are read in chunks."""
SMALLEST_FLOOR = 2.0**-100
"""Of a group's amax: above it activations, codes times scales, are normal numbers of bf16."""
KINDS = ("cuda", "rocm", "xpu")
"""Where Triton generates code. Anything else refuses."""

_SCALE_KINDS: dict[object, str] = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}
_ROCM_FP8 = ("gfx950", "gfx1200", "gfx1201", "gfx1250")


@cache
def dot_element(platform: Platform, element: str) -> bool:
    """Whether matrix instructions take two operands of this element ("fp8", "fp8fnuz"); else they are decoded."""
    if element == "fp8":
        has = platform.capability >= 89 or (platform.kind == "rocm" and platform.arch in _ROCM_FP8)
        return has and platform.value("fp8") != "none"
    return element == "fp8fnuz" and platform.kind == "rocm" and platform.arch == "gfx942"


@cache
def native_cast(platform: Platform, element: str) -> bool:
    """Whether fp32 -> fp8 by the chip gives the reference's bytes.

    Only where that was seen. Triton up to 3.7.1 rounds twice on sm_89 (its issue 11753), triton-xpu before 3.5
    saturates at 256 (intel-xpu-backend-for-triton 3814), and on AMD nobody has run it: those use the codec.
    """
    return element == "fp8" and platform.capability >= 90 and platform.value("fp8") != "none"


@cache
def native_load(platform: Platform, element: str) -> bool:
    """Whether fp8 -> fp16 or bf16 by the chip is exact (it is wherever the chip has the instruction)."""
    return element == "fp8" and platform.capability >= 89 and platform.value("fp8") != "none"


@cache
def ptx_decode(platform: Platform, compute: torch.dtype) -> bool:
    """Whether `codec.decode_ptx` decodes to this dtype here: exact, and faster than the chip's own conversion."""
    return platform.capability >= (75 if compute == torch.float16 else 80) and compute != torch.float32


@cache
def bf16_dot(platform: Platform) -> torch.dtype:
    """What bf16 operands are multiplied in: fp32 where there is no bf16 instruction (sm_75, Triton's interpreter)."""
    return torch.bfloat16 if platform.kind in KINDS and platform.arch != "sm_75" else torch.float32


@cache
def has_tma(platform: Platform) -> bool:
    """Tensor memory accelerator: block copies described on the host."""
    return platform.capability in (90, 100, 103)


@cache
def multiply_options(platform: Platform) -> dict[str, str]:
    """What Intel's compiler is told of multiplications: 256 registers a thread. With 128 the shipped tiles spill.

    Source: ocloc of Debian 12 for PVC (tests/xpu): 64x128x32 on 16 warps spills 60 of 128 registers, 0 of 256.
    """
    return {"grf_mode": "large"} if platform.kind == "xpu" else {}


@cache
def quantize_options(platform: Platform, warps: int) -> dict[str, Any]:
    """Warps of a quantizer. On Intel twice as many (DG2: four times), with 256 registers a thread: as many as elsewhere
    spill up to 127 registers on PVC and 1035 on DG2.

    Source: ocloc of Debian 12 (tests/xpu).
    """
    if platform.kind != "xpu":
        return {"num_warps": warps}
    return {"num_warps": (4 if platform.arch == "dg2" else 2) * warps, **multiply_options(platform)}


@cache
def fused_multiply_add(platform: Platform) -> bool:
    """Whether `tl.fma` rounds once; the interpreter's rounds twice."""
    return platform.kind in ("cuda", "rocm")


def is_grouped(fmt: Format) -> bool:
    """Whether a scale serves part of one row: such formats are quantized in one launch and one read."""
    return fmt.block[0] == 1 and fmt.block[1] is not None and fmt.block[1] <= GROUP_MAX


def scale_kind(fmt: Format, dtype: object) -> str:
    """How kernels read scales stored in this dtype: "e8m0" and "e4m3" come as bytes, "float" as values."""
    return _SCALE_KINDS.get(dtype, "float")


@cache
def holds_products(fmt: Format, scale: torch.dtype, compute: torch.dtype) -> bool:
    """Whether this dtype holds code times scale, for scales stored as `scale` in groups that a tile can hold whole.

    Codes have at most four significant bits, E8M0 scales one, NVFP4's E4M3 scales (of two-bit codes) four: bf16's eight
    hold the products, and its exponents are fp32's. Only products below 2^-126, of scales below 2^-117, are rounded,
    to multiples of 2^-133. fp16 holds NVFP4's.
    """
    exact = fmt.two_level or (scale == torch.float8_e8m0fnu and compute != torch.float16)
    return exact and fmt.block[1] in (16, 32, 64, 128)


@cache
def common_dtype(
    x: Format, x_scale: torch.dtype, w: Format, w_scale: torch.dtype, platform: Platform
) -> torch.dtype | None:
    """What holds both operands with their scales, so that nothing is promoted; None: nothing does, or the matrix unit
    has no such instruction, or groups are 128 wide and fp8 products promoted with their scales are as fast."""
    compute = torch.float16 if x.two_level and w.two_level else bf16_dot(platform)
    if not holds_products(x, x_scale, compute) or not holds_products(w, w_scale, compute):
        return None
    missing = compute == torch.float32 and platform.kind in KINDS
    return None if missing or x.block[1] == w.block[1] == 128 else compute


@cache
def without_fp8(platform: Platform) -> Platform:
    """The same chip as if it had no fp8 type or instruction, for kernels that are ordered to keep to integer codecs."""
    return platform.with_features([("fp8", "none")])
