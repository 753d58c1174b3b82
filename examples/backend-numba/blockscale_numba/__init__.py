"""FP8 linear layers on any processor that LLVM knows, through Numba. A tutorial: README.md explains each part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from blockscale import BlockScaled, Platform, Problem, reference
from blockscale.layouts import decode_scale

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Linear:
    """E4M3 weights with any block, read as stored; fp32 sums."""

    name, op = "numba.linear", "linear"
    layout = "row"
    priority = 10
    m_range = (1, None)

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        """Every reason at once, from plain data: no hardware is asked here, and nothing is imported."""
        if platform.kind != "cpu":
            yield f"runs on cpu, not on {platform.kind}"
        if problem.format is None or problem.format.element.name != "fp8":
            yield f"reads E4M3 weights, not {problem.format}"
        for what, dtype in {"x": problem.x_dtype, "out": problem.out_dtype}.items():
            if dtype not in _FLOATS:
                yield f"{what} is {dtype}, needs float32, bfloat16 or float16"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        """`x: [M, K]`, `w: [N, K]`, bias `[N]` -> `[M, N]` in the problem's out_dtype."""
        from .multiply import multiply  # numba takes a second to import: only when the kernel really runs

        x = reference.activations(x, w, problem.numerics).contiguous()  # quantized and read back, as the numerics say
        y = torch.empty(x.shape[0], problem.n)
        rows, cols = w.format.block_shape(problem.n, problem.k)
        codes, scale = w.data.view(torch.uint8), decode_scale(w.scale)
        multiply(x.numpy(), codes.numpy(), scale.contiguous().numpy(), rows, cols, y.numpy())
        if bias is not None:
            y += bias
        return y.to(problem.out_dtype)


KERNELS = [Linear()]
