"""From packed operands and a configuration to a launch. Imports triton: imported inside `run` only."""

from __future__ import annotations

from torch import Tensor

from ...tensor import BlockScaled
from . import swap, wide
from .config import Config, Wide
from .launch import Launch


def launch(
    x: BlockScaled, w: BlockScaled, bias: Tensor | None, y: Tensor, config: Config, sm_count: int
) -> Launch:
    """One launch of `y = x @ w.T + bias`.

    x: fp8_1x128 [M, K] in layout "tma"; w: fp8_128x128 [N, K] in layout "row" with fp32 scales; y: [M, N], rows at
    multiples of 16 bytes for a Wide configuration.
    """
    if isinstance(config, Wide):
        return wide.launch(x.data, x.scale, w.data, w.scale, bias, y, config, sm_count)
    return swap.launch(x.data, x.scale, w.data, w.scale, bias, y, config, sm_count)
