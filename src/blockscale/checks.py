"""What must hold of operands before a kernel sees them: it would read past an end, or take one dtype for another.

Each raises ShapeError or DtypeError with what was got and what is needed. Public functions and modules ask where the
caller stands. The ops behind them ask about experts too, for those who call them by themselves; a plain eager call has
been asked and passes them by (`shortcut.experts`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import DtypeError, ShapeError
from .tensor import BlockScaled

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = {"grouped_linear": "offsets", "masked_linear": "counts", "gathered_linear": "ids"}
_Shape = torch.Size | tuple[int, ...]


def stored(op: str, name: str, w: object) -> None:
    """A block-scaled tensor and no plain one."""
    if not isinstance(w, BlockScaled):
        raise DtypeError(f"{op}: {name} needs a BlockScaled (`quantize` makes one), got {type(w).__name__}")


def matrix(op: str, w: object, called: str = "w [N, K]") -> None:
    """One stored matrix `[N, K]`."""
    stored(op, called[0], w)
    assert isinstance(w, BlockScaled)
    if len(w.shape) != 2:
        raise ShapeError(f"{op}: needs {called}, got {list(w.shape)}; stacks of experts go to grouped_linear")


def same_k(x: _Shape, w: BlockScaled) -> None:
    """x `[..., K]` and w `[..., N, K]`."""
    if not x or x[-1] != w.shape[-1]:
        raise ShapeError(f"{w.format}: x {list(x)} and w {list(w.shape)} need the same K (the last dimension)")


def operands(op: str, x: Tensor, data: Tensor, w: _Shape, bias: Tensor | None = None) -> None:
    """dtypes and devices of what a linear takes: x, the data of a weight of the logical shape w, a bias."""
    if not x.dtype.is_floating_point or x.element_size() == 1:
        raise DtypeError(f"{op}: x needs float32, bfloat16 or float16, got {x.dtype}; quantized x goes to matmul")
    if x.device != data.device:
        raise DtypeError(f"{op}: x is on {x.device}, the weight on {data.device}")
    fits(op, bias, w)
    if bias is not None and bias.device != data.device:
        raise DtypeError(f"{op}: bias is on {bias.device}, the weight on {data.device}")


def fits(op: str, bias: Tensor | None, w: _Shape) -> None:
    """A bias `[N]` for w `[N, K]`, or none."""
    if bias is None:
        return
    if tuple(bias.shape) != (w[-2],):
        raise ShapeError(f"{op}: w {list(w)} needs bias [{w[-2]}], got {list(bias.shape)}")
    if bias.dtype not in _FLOATS:
        raise DtypeError(f"{op}: bias needs float32, bfloat16 or float16, got {bias.dtype}")


def grouped(x: _Shape, w: _Shape, offsets: Tensor) -> None:
    """Shapes of `grouped_linear`."""
    if len(w) != 3 or len(x) != 2 or x[1] != w[2] or offsets.shape != (w[0],):
        raise ShapeError(
            f"grouped_linear: needs x [T, K], w [E, N, K] and offsets [E], got {list(x)}, {list(w)} and "
            f"{list(offsets.shape)}"
        )


def masked(x: _Shape, w: _Shape, counts: Tensor) -> None:
    """Shapes of `masked_linear`."""
    if len(w) != 3 or len(x) != 3 or (x[0], x[2]) != (w[0], w[2]) or counts.shape != (w[0],):
        raise ShapeError(
            f"masked_linear: needs x [E, C, K], w [E, N, K] and counts [E], got {list(x)}, {list(w)} and "
            f"{list(counts.shape)}"
        )


def gathered(x: _Shape, w: _Shape, ids: Tensor) -> None:
    """Shapes of `gathered_linear`."""
    if len(w) != 3 or len(x) != 2 or x[1] != w[2] or ids.dim() != 2 or ids.shape[0] != x[0]:
        raise ShapeError(
            f"gathered_linear: needs x [T, K], w [E, N, K] and ids [T, k], got {list(x)}, {list(w)} and "
            f"{list(ids.shape)}"
        )


def where(op: str, x: Tensor, rows: Tensor) -> None:
    """Which rows of x meet which expert: offsets, counts or ids."""
    if rows.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"{op}: {_ROWS[op]} needs int32, got {rows.dtype}")
    if rows.device != x.device:
        raise DtypeError(f"{op}: x is on {x.device}, {_ROWS[op]} on {rows.device}")
