"""Limits of a GPU, measured: what a kernel's time is compared with. Kernels are timed by `kernels/gluon/measure.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

Call = Callable[[], object]


def eager_us(call: Call, repeat: int = 20) -> float:
    """Microseconds of one call, launched one by one."""
    call()
    torch.cuda.synchronize()
    start, end = _event(), _event()
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / repeat


def ceilings() -> dict[str, float]:
    """Measured limits of this GPU: copy and read bandwidth in GB/s, bf16 matrix rate in TFLOP/s."""
    size = 1 << 30
    a = torch.empty(size, device="cuda", dtype=torch.uint8).random_()
    b = torch.empty_like(a)
    copy = eager_us(lambda: b.copy_(a))
    words = a.view(torch.float32)
    read = eager_us(lambda: torch.amax(words))
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = eager_us(lambda: m @ m)
    return {
        "copy_gb_s": 2 * size / copy / 1e3,
        "read_gb_s": size / read / 1e3,
        "bf16_tflop_s": 2 * 8192**3 / product / 1e6,
    }


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
