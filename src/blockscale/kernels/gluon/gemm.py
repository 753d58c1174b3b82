"""From packed operands and a configuration to a launch. Imports triton: imported inside `run` only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...formats import get_format
from ...layouts import convert, decode_scale
from ...tensor import BlockScaled
from . import swap, wide
from .config import Config, Wide, ceil_div
from .launch import Launch
from .selection import misfit


def launch(
    x: BlockScaled, w: BlockScaled, bias: Tensor | None, y: Tensor, config: Config, sm_count: int,
    workspace: Tensor | None = None, early: bool = False,
) -> Launch:  # fmt: skip
    """One launch of `y = x @ w.T + bias`.

    x: fp8_1x128 [M, K] in layout "tma"; w: fp8_128x128 [N, K] in layout "row"; y: [M, N], rows at multiples of
    16 bytes for a Wide configuration. workspace: fp32 for partial tiles (`config.floats`), else allocated here.
    early: fetch weights while the kernel before still runs, where the configuration overlaps launches at all. Only when
    that kernel waits for its own predecessor before it lets this one start, as `quantize_kernel` and these GEMMs do:
    then whatever wrote the weights has ended.

    Raises ValueError where the configuration does not fit K.
    """
    if why := misfit(config, w.shape[1]):
        raise ValueError(f"launch: {why}")
    e8m0 = w.scale.dtype == torch.float8_e8m0fnu  # its bytes are decoded in the kernel: triton knows no such dtype
    w_scale = w.scale.view(torch.uint8) if e8m0 else decode_scale(w.scale)
    operands = (x.data, x.scale, w.data, w_scale, bias, y)
    if isinstance(config, Wide):
        return wide.launch(*operands, config, sm_count, workspace, early)
    return swap.launch(*operands, config, sm_count, workspace, early)


def multiply(
    x: BlockScaled, w: BlockScaled, bias: Tensor | None, out_dtype: torch.dtype, config: Config, sm_count: int,
    early: bool = False,
) -> Tensor:  # fmt: skip
    """`x @ w.T + bias`: [M, N] in `out_dtype`. Operands and `early` as for `launch`."""
    m, n = x.shape[0], w.shape[0]
    if m == 0:
        return torch.empty(0, n, device=x.device, dtype=out_dtype)
    per_16_bytes = 16 // out_dtype.itemsize
    y = torch.empty(m, ceil_div(n, per_16_bytes) * per_16_bytes, device=x.device, dtype=out_dtype)[:, :n]
    launch(x, w, bias, y, config, sm_count, early=early).run()
    return y.contiguous()  # copies only where N itself is not a multiple of 16 bytes


def tma_scales(x: BlockScaled) -> BlockScaled:
    """x with fp32 scales in layout "tma", whatever it comes in. Values stay the same."""
    if x.layout == "tma":
        return x
    row = convert(x, "row")
    return convert(replace(row, scale=decode_scale(row.scale), format=get_format("fp8_1x128")), "tma")
