"""Intel XPU by the ops of the package vllm-xpu-kernels: checked against their schemas, guarded against their guesses.

The package is loaded by `platform.detect` on an XPU and by nobody else. What each op needs and gets wrong is written
where its adapter is: `contract` (schemas), `quantize`, `multiply`, `grouped`. Nothing here has run on Intel hardware
yet: docs/xpu.md says what was checked instead, and how to check it there.
"""

from __future__ import annotations

from typing import Any

from . import grouped, multiply, quantize, scaled_mm

KERNELS: list[Any] = [*quantize.KERNELS, *multiply.KERNELS, *grouped.KERNELS, *scaled_mm.KERNELS]
