"""Checkpoints on disk: read, make, convert and check every block-scaled format. Floor 9."""

from .quantize import quantize_checkpoint
from .reader import Checkpoint, StoredLayer, open_checkpoint

__all__ = ["Checkpoint", "StoredLayer", "open_checkpoint", "quantize_checkpoint"]
