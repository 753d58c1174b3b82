"""Checkpoints on disk: read, make, convert and check every block-scaled format."""

from .convert import convert_checkpoint, dequantize_checkpoint
from .quantize import quantize_checkpoint
from .reader import Checkpoint, StoredLayer, open_checkpoint
from .verify import compare_checkpoints

__all__ = [
    "Checkpoint",
    "StoredLayer",
    "compare_checkpoints",
    "convert_checkpoint",
    "dequantize_checkpoint",
    "open_checkpoint",
    "quantize_checkpoint",
]
