"""Hopper kernels written in Gluon: FP8 with 1x128 activation scales times 128x128 weight scales, for sm_90.

`gluon.decode` serves a decode step's tokens, `gluon.prefill` more; `selection.py` chooses the configuration of each
launch. Triton is imported when a kernel first runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...formats import Format
from ...platform import Platform, detect
from ...registry import Problem
from ...tensor import BlockScaled
from .config import Config
from .selection import choose, entry

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SHOWN_ROWS = (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
_SMALLEST_FLOOR = 1e-30  # below it a scale could be subnormal, which the fast division does not round right


def heuristic(problem: Problem, m: int, sm_count: int, chip: str = "") -> Config:
    """The configuration for m rows: pure, so that any choice can be looked at on any machine.

    chip: the card whose measured table is asked first, as in `Platform.value("chip")`; "" asks none.
    """
    return choose(m, problem.n, problem.k, sm_count, chip, problem.out_dtype.itemsize)


class _Gluon:
    """accumulation_error: Hopper's tensor cores sum fp8 products in about 14 bits, truncating, within the 128 elements
    of a k-block (DeepSeek-V3 report, section 3.3.2); relative to the sum of magnitudes."""

    layout = "row"
    m_range: tuple[int, int | None]
    accumulation_error = 2.0**-10

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        if platform.capability != 90:
            yield f"uses wgmma, which only sm_90 has, not {platform.arch or platform.kind}"
        if not platform.at_least("triton", "3.6"):
            yield f"needs triton 3.6 or newer, got {platform.value('triton') or 'none'}"
        fmt = problem.format
        if fmt is None or fmt.element.name != "fp8" or fmt.block != (128, 128):
            yield f"weights are {fmt}, needs fp8 in blocks of 128x128"
        if problem.k % 16:
            yield f"K={problem.k} is not a multiple of 16: TMA wants rows at multiples of 16 bytes"
        if problem.out_dtype not in _FLOATS:
            yield f"out is {problem.out_dtype}, needs float32, bfloat16 or float16"

    def configurations(self, problem: Problem, platform: Platform) -> Iterator[str]:
        """What it would launch, at some M that it serves, and which table's row or rule says so."""
        low, high = self.m_range
        sm_count, chip = int(platform.value("sms") or 132), platform.value("chip") or ""
        out_bytes = problem.out_dtype.itemsize
        for m in _SHOWN_ROWS:
            if low <= m and (high is None or m <= high):
                config = heuristic(problem, m, sm_count, chip)
                yield f"M={m}: {config} ({entry(m, problem.n, problem.k, chip, out_bytes)})"

    def _activations(self, act: Format | None) -> Iterator[str]:
        if act is None:
            yield "multiplies quantized activations, and the numerics leave them as they are"
        elif act.element.name != "fp8" or act.block != (1, 128):
            yield f"activations are {act}, needs fp8 in groups of 1x128"

    def _multiply(self, problem: Problem, x: BlockScaled, w: BlockScaled, bias: Tensor | None) -> Tensor:
        from .gemm import multiply

        platform = detect(w.device)
        sm_count = int(platform.value("sms") or 132)
        config = heuristic(problem, x.shape[0], sm_count, platform.value("chip") or "")
        return multiply(x, w, bias, problem.out_dtype, config, sm_count)


class _Linear(_Gluon):
    op = "linear"

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        act = problem.activation_format
        yield from self._activations(act)
        if act is not None and act.scale_rounding == "pow2_floor":
            yield "activation scales are rounded down to powers of two, it rounds up or not at all"
        if problem.x_dtype not in _FLOATS:
            yield f"x is {problem.x_dtype}, needs float32, bfloat16 or float16"
        if problem.numerics.act_floor < _SMALLEST_FLOOR:
            yield f"act_floor {problem.numerics.act_floor:g} is below {_SMALLEST_FLOOR:g}: scales could be subnormal"

    def run(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
        return self.bind(problem)(x, w.data, w.scale, None, None, bias, x.shape[0])

    def bind(self, problem: Problem) -> Callable[..., Tensor]:
        from .eager import linear  # imports triton

        return linear(problem)


class _Matmul(_Gluon):
    op = "matmul"
    x_layout = "tma"
    """Other layouts of x's scales are converted first."""

    def why_not(self, problem: Problem, platform: Platform) -> Iterator[str]:
        yield from super().why_not(problem, platform)
        yield from self._activations(problem.x_format)

    def run(self, problem: Problem, x: BlockScaled, w: BlockScaled) -> Tensor:
        from .gemm import tma_scales

        return self._multiply(problem, tma_scales(x), w, None)


class DecodeLinear(_Linear):
    name, priority, m_range = "gluon.decode", 81, (1, 64)


class PrefillLinear(_Linear):
    name, priority, m_range = "gluon.prefill", 80, (65, None)


class DecodeMatmul(_Matmul):
    name, priority, m_range = "gluon.decode", 81, (1, 64)


class PrefillMatmul(_Matmul):
    name, priority, m_range = "gluon.prefill", 80, (65, None)


KERNELS = [DecodeLinear(), PrefillLinear(), DecodeMatmul(), PrefillMatmul()]
