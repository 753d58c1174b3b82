"""The fast paths of ordinary processors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...platform import Platform
from ...registry import Problem
from ...tensor import BlockScaled
from . import slices

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Slices:
    """FP8 linear in plain torch: decode a few hundred rows exactly, `torch.mm`, repeat. Needs no compiler."""

    name, op = "cpu.slices", "linear"
    layout = "row"
    priority = 30
    m_range = (1, None)

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        if platform.kind != "cpu":
            yield f"runs on cpu, not on {platform.kind}"
        if problem.format is None or problem.format.packed:
            yield f"reads FP8 weights, not {problem.format}"
        for what, dtype in {"x": problem.x_dtype, "out": problem.out_dtype}.items():
            if dtype not in _FLOATS:
                yield f"{what} is {dtype}, needs float32, bfloat16 or float16"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        return slices.linear(x, w, bias, problem.numerics, problem.out_dtype)


KERNELS = [Slices()]
