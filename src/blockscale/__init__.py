"""Block-scaled FP8 and FP4 tensors on any accelerator."""
