"""Modules over the operations.

A module holds the stored bytes as buffers under the checkpoint's names. `.to(device)` moves them; no cast touches
them: after `.to(torch.bfloat16)`, `.half()` or `.float()` every FP8 byte and every scale is what it was.
"""

from .dense import DenseLinear
from .experts import BlockDiagonalLinear, Experts, StackedLinear
from .linear import Linear, Names, StoredModule, WeightModule

__all__ = [
    "BlockDiagonalLinear",
    "DenseLinear",
    "Experts",
    "Linear",
    "Names",
    "StackedLinear",
    "StoredModule",
    "WeightModule",
]
