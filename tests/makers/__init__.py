"""Tiny random checkpoints that are faithful to the formats on disk: names, dtypes, scale grids and configs.

Each maker writes a folder that tools and transformers take for the real thing. Names and configs are spelled out
here once more, on purpose: nothing of `blockscale.checkpoint` is used, so it is tested against them.
"""

from .deepseek_v3 import make_deepseek_v3
from .deepseek_v4 import make_deepseek_v4
from .llama import make_llama
from .qwen3_moe import make_minimax_m2, make_qwen3_moe

__all__ = ["make_deepseek_v3", "make_deepseek_v4", "make_llama", "make_minimax_m2", "make_qwen3_moe"]
