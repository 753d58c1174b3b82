"""How much a quantization changed a tensor: the numbers of the report."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layouts import decode_scale
from ..reference import dequantize
from ..tensor import BlockScaled

SAMPLE = 1 << 18
"""Elements measured of each tensor by default, together at its end. Measuring costs more than quantizing does."""
_WINDOWS = 16
"""Places at which they are taken, at most."""
_GATHER = 1 << 16
"""Scales counted at a time."""


class Stats:
    """Error of one tensor, gathered slab by slab.

    full: measure every element; otherwise about SAMPLE of them, whole blocks spread over the tensor, the same ones in
    every run. Scales are always all counted.
    """

    def __init__(self, elements: int, slab_count: int, full: bool) -> None:
        self._full = full or elements <= SAMPLE
        self._every = -(-slab_count // _WINDOWS)
        self._budget = SAMPLE // max(1, -(-slab_count // self._every))
        self._error = self._power = 0.0
        self._measured = self._clipped = self._zeros = 0
        self._scales: Counter[int] = Counter()
        self._uncounted: list[Tensor] = []
        self._waiting = 0
        self._held: list[tuple[Tensor, BlockScaled, float]] = []
        self._amax = 0.0

    def add(self, x: Tensor, q: BlockScaled, index: int) -> None:
        """One slab `x: [rows, cols]` and what became of it."""
        level = self._note_scales(q)
        if self._full:
            self._measure(x.float(), q, level)
        elif index % self._every == 0:
            self._hold(*self._window(x, q, index // self._every), level)

    def add_exact(self, q: BlockScaled, mixed: bool) -> None:
        """A slab `q: [rows, cols]` whose values did not change. mixed: others of the tensor may have changed."""
        self._note_scales(q)
        self._measured += q.shape[-2] * q.shape[-1]
        if mixed:
            self._power += float(dequantize(q).square().sum(dtype=torch.float64))

    def _note_scales(self, q: BlockScaled) -> float:
        """Keep the scales for counting; returns the global scale."""
        level = 1.0 if q.global_scale is None else float(q.global_scale)
        scale = decode_scale(q.scale).flatten()
        self._uncounted.append(scale * level if level != 1.0 else scale)
        self._waiting += scale.numel()
        if self._waiting >= _GATHER:
            self._count_scales()
        return level

    def _count_scales(self) -> None:
        scale = torch.cat(self._uncounted) if self._uncounted else torch.zeros(0)
        self._uncounted.clear()
        self._waiting = 0
        exponents = torch.frexp(scale[scale > 0])[1] - 1
        found, counts = torch.unique(exponents, return_counts=True)
        self._scales.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))

    def _window(self, x: Tensor, q: BlockScaled, index: int) -> tuple[Tensor, BlockScaled]:
        """Whole blocks of a slab, at a place that moves with the window's index."""
        rows, cols = x.shape
        br, bc = q.format.block_shape(rows, cols)
        high = min(rows, max(br, 128 // br * br))
        wide = min(cols, max(bc, self._budget // high // bc * bc))
        top = (index * 7 % max(1, rows // high)) * high
        left = (index * 11 % max(1, cols // wide)) * wide
        left = left // bc * bc
        data_cols = slice(left // 2, (left + wide) // 2) if q.format.packed else slice(left, left + wide)
        part = BlockScaled(
            q.data[top : top + high, data_cols],
            q.scale[top // br : -(-(top + high) // br), left // bc : -(-(left + wide) // bc)],
            q.format,
            shape=(high, wide),
            global_scale=q.global_scale,
        )
        return x[top : top + high, left : left + wide], part

    def _hold(self, x: Tensor, q: BlockScaled, level: float) -> None:
        """Keep a window until there are others like it: measuring one is all overhead."""
        if q.format.block[0] is None:  # one scale for all rows: windows do not make a matrix together
            self._measure(x.float(), q, level)
            return
        if self._held and (self._held[0][1].shape != q.shape or self._held[0][2] != level):
            self._measure_held()
        own = replace(q, data=q.data.clone(), scale=q.scale.clone())
        self._held.append((x.clone(), own, level))

    def _measure_held(self) -> None:
        if not self._held:
            return
        xs, qs, levels = zip(*self._held, strict=True)
        self._held.clear()
        data, scale = (_stacked([getattr(q, part) for q in qs]) for part in ("data", "scale"))
        shape = (sum(q.shape[0] for q in qs), qs[0].shape[1])
        self._measure(torch.cat(xs).float(), replace(qs[0], data=data, scale=scale, shape=shape), levels[0])

    def _measure(self, x: Tensor, q: BlockScaled, level: float) -> None:
        y = dequantize(q)
        error, power = _squares(x - y), _squares(x)
        if not math.isfinite(error + power):  # --nan keep, where such elements do not count, or squares beyond fp32
            x, y = (torch.where(t.isfinite(), t, 0.0).double() for t in (x, y))
            error, power = _squares(x - y), _squares(x)
        self._error += error
        self._power += power
        magnitude = x.abs()
        self._measured += x.numel()
        self._zeros += int(((y == 0) & (magnitude > 0)).sum())
        self._clipped += int((magnitude > self._reach(x, q, level)).sum())
        self._amax = max(self._amax, float(magnitude.amax()) if x.numel() else 0.0)

    def _reach(self, x: Tensor, q: BlockScaled, level: float) -> Tensor:
        """The largest magnitude that each element's scale reaches; one number where all share it."""
        br, bc = q.format.block_shape(*x.shape)
        top = decode_scale(q.scale) * (level * q.format.max * (1 + 2**-20))
        if top.numel() == 1:
            return top.reshape(())
        return top.repeat_interleave(br, 0)[: x.shape[0]].repeat_interleave(bc, 1)[:, : x.shape[1]]

    def result(self) -> dict[str, Any]:
        """relative_error: ||x - y|| / ||x||. sqnr_db. clipped, zeros: shares of the measured elements.

        zeros: not zero before, zero now. scales: {exponent of two: count}.
        """
        self._count_scales()
        self._measure_held()
        relative = math.sqrt(self._error / self._power) if self._power > 0 else 0.0
        return {
            "relative_error": _rounded(relative),
            "sqnr_db": _rounded(-20 * math.log10(relative)) if relative > 0 else None,
            "clipped": _rounded(self._clipped / max(1, self._measured)),
            "zeros": _rounded(self._zeros / max(1, self._measured)),
            "amax": self._amax,
            "measured": self._measured,
            "scales": {str(e): n for e, n in sorted(self._scales.items())},
        }


def _stacked(parts: list[Tensor]) -> Tensor:
    """One above the other; as bytes, since not every 8-bit type can be concatenated."""
    return torch.cat([part.view(torch.uint8) if part.itemsize == 1 else part for part in parts]).view(parts[0].dtype)


def _squares(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _rounded(value: float) -> float:
    """Six digits: sums differ in the last bits with the number of threads, and the report shall not."""
    return float(f"{value:.6g}")
