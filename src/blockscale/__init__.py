"""Block-scaled FP8 and FP4 tensors on any accelerator: `x ≈ data * scale`, one scale for each block.

>>> import torch, blockscale
>>> w = blockscale.quantize(torch.randn(192, 576), "fp8_128x128")  # ragged shapes are ordinary
>>> x = torch.randn(4, 576, dtype=torch.bfloat16)
>>> blockscale.linear(x, w).shape
torch.Size([4, 192])
"""

import os

from . import interrupt as _interrupt  # noqa: F401  # first of all, before torch
from . import nn
from .errors import (
    BlockscaleError,
    CheckpointError,
    DtypeError,
    NoKernelError,
    ScaleError,
    ShapeError,
    UnknownNameError,
)
from .formats import FORMATS, Format, get_format
from .layouts import LAYOUTS, convert
from .numerics import PRESETS, Numerics, get_numerics
from .ops import (
    dense_linear,
    dequantize,
    gathered_linear,
    grouped_linear,
    linear,
    linear_problem,
    masked_linear,
    matmul,
    quantize,
    rmsnorm_quantize,
    swiglu_quantize,
)
from .platform import Platform, detect
from .registry import Decision, Kernel, Plan, Problem, explain, register, select, unregister
from .tensor import BlockScaled
from .verdicts import SWITCH as _SWITCH
from .version import __version__

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "PRESETS",
    "BlockScaled",
    "BlockscaleError",
    "CheckpointError",
    "Decision",
    "DtypeError",
    "Format",
    "Kernel",
    "NoKernelError",
    "Numerics",
    "Plan",
    "Platform",
    "Problem",
    "ScaleError",
    "ShapeError",
    "UnknownNameError",
    "__version__",
    "convert",
    "dense_linear",
    "dequantize",
    "detect",
    "explain",
    "gathered_linear",
    "get_format",
    "get_numerics",
    "grouped_linear",
    "linear",
    "linear_problem",
    "masked_linear",
    "matmul",
    "nn",
    "quantize",
    "register",
    "rmsnorm_quantize",
    "select",
    "swiglu_quantize",
    "unregister",
]

if os.environ.get(_SWITCH) == "1":
    from .conformance import selftest as _selftest

    _selftest.enable()
