"""Checkpoints on disk: read, make, convert and check every block-scaled format."""

from .quantize import quantize_checkpoint
from .reader import Checkpoint, StoredLayer, open_checkpoint

__all__ = ["Checkpoint", "StoredLayer", "open_checkpoint", "quantize_checkpoint"]
