"""torch.nn.functional.scaled_mm on XPU, where a tiny run showed that it multiplies 128x128 blocks. Floor 4.

Versions say little: block scaling came to XPU piece by piece. `platform.detect` tries it once on the device and leaves
a verdict, the feature `scaled_mm`: "row" or "column" (how the scales must lie), or what went wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import reference
from ...layouts import decode_scale
from ...platform import Platform
from ...registry import Problem
from ...tensor import BlockScaled
from .multiply import BLOCK
from .quantize import FLOATS


class Linear:
    """W8A8 with activations quantized by torch operations, to the byte of the definition. Scales lie by `lie`."""

    op, layout, m_range = "linear", "row", (1, None)

    def __init__(self, lie: str, priority: int) -> None:
        self.name, self.lie, self.priority = f"torch_scaled.xpu_{lie}", lie, priority

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        if platform.kind != "xpu":
            yield f"probed on xpu only, not on {platform.kind}"
            return
        verdict = platform.value("scaled_mm")
        if verdict is None:
            yield "scaled_mm has not been tried on this platform"
        elif verdict != self.lie:
            yield f"scaled_mm was tried on this device with scales by {self.lie}: the verdict is {verdict!r}"
        fmt, act = problem.format, problem.activation_format
        if fmt is None or fmt.element.name != "fp8" or fmt.block != BLOCK:
            yield f"weights are {fmt}, needs E4M3FN in blocks of 128x128"
        if act is None or act.element.name != "fp8" or act.block != (1, 128):
            yield f"activations in {act}, needs E4M3FN in groups of 1x128"
        if problem.k % 128 or problem.n % 128:
            yield f"N={problem.n}, K={problem.k}: only whole blocks of 128 were tried"
        if problem.x_dtype not in FLOATS or problem.out_dtype != torch.bfloat16:
            yield f"x is {problem.x_dtype} and out {problem.out_dtype}: only a result in bfloat16 was tried"

    def notes(self, problem: Problem) -> Iterator[str]:
        yield "activations are quantized by torch operations; scales are copied to fp32 where they lie otherwise"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        assert problem.activation_format is not None
        q = reference.quantize(x, problem.activation_format, floor=problem.numerics.act_floor)
        scales = [decode_scale(s) for s in (q.scale, w.scale)]
        if self.lie == "column":
            scales = [s.mT.contiguous().mT for s in scales]
        kinds = (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128)
        y: Tensor = F.scaled_mm(
            q.data, w.data.mT, scales[0], kinds[0], scales[1], kinds[1], output_dtype=problem.out_dtype
        )
        return y if bias is None else (y.float() + bias.float()).to(problem.out_dtype)


KERNELS = [Linear("row", 65), Linear("column", 64)]
