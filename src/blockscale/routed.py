"""Experts whose rows are not sorted, in plain torch: the definitions of `masked_linear` and `gathered_linear`.

Both are `reference.grouped_linear` over the same rows in another order, second-level activation scales included: those
belong to all rows that an expert gets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .numerics import Numerics
from .reference import grouped_linear
from .tensor import BlockScaled


def masked_linear(
    x: Tensor, w: BlockScaled, counts: Tensor, *, numerics: Numerics, compute: torch.dtype = torch.float64
) -> Tensor:
    """Every expert's rows in a buffer of its own: `x: [E, C, K]`, `w: [E, N, K]` -> `[E, C, N]`.

    counts: int `[E]`, how many of an expert's C rows hold tokens, from the first on; the others are never read and
    come out as zero.
    """
    checks.masked(x.shape, w.shape, counts)
    held = torch.arange(x.shape[1], device=x.device) < counts[:, None]
    y = x.new_zeros(*x.shape[:2], w.shape[1])
    y[held] = grouped_linear(x[held], w, counts.cumsum(0), numerics=numerics, compute=compute)
    return y


def gathered_linear(
    x: Tensor, w: BlockScaled, ids: Tensor, *, numerics: Numerics, compute: torch.dtype = torch.float64
) -> Tensor:
    """Every row times each of its experts: `x: [T, K]`, `w: [E, N, K]`, ids: int `[T, k]` -> `[T, k, N]`.

    Ids outside 0 … E - 1 stand for no expert: their rows come out as zero.
    """
    checks.gathered(x.shape, w.shape, ids)
    experts, per_row = w.shape[0], ids.shape[1]
    flat = torch.where((ids >= 0) & (ids < experts), ids, experts).flatten()
    order = flat.argsort(stable=True)
    offsets = torch.searchsorted(flat[order], torch.arange(experts, device=x.device, dtype=flat.dtype), right=True)
    y = x.new_zeros(flat.numel(), w.shape[1])
    y[order] = grouped_linear(x[order // max(per_row, 1)], w, offsets, numerics=numerics, compute=compute)
    return y.view(*ids.shape, -1)
