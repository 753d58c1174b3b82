"""Shapes of the linear layers of open block-scaled models, and the token counts that matter."""

from __future__ import annotations

NK = (
    (2112, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
    (18432, 7168),
    (7168, 18432),
    (1536, 7168),
    (12288, 4096),
    (4096, 12288),
)
"""(N, K) of DeepSeek-V3 (its projections, dense and shared MLPs) and of two dense models of 12288 hidden units."""

M = (1, 8, 16, 32, 64, 128, 512, 2048, 4096, 8192)

UNSEEN = ((5120, 3072), (3584, 4608), (2048, 5120))
"""(N, K) that no table and no fit has seen: how well the choice generalises."""

RULE_N = (192, 576, 1024, 1536, 2048, 2112, 3072, 3584, 4096, 5120, 7168, 9216, 12288, 18432, 24576, 32768)
RULE_K = (128, 512, 576, 720, 1024, 1536, 2048, 2304, 3072, 4096, 4608, 5120, 7168, 12288, 18432)
RULE_M = (1, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512, 1024, 2048, 4096, 8192)
"""Shapes that show which configurations the rule can give."""

REGIMES = (("M<=16", 1, 16), ("M=32..64", 32, 64), ("M=128..512", 128, 512), ("M>=2048", 2048, 1 << 30))


def regime(m: int) -> str:
    """The name of the regime that M tokens belong to."""
    return next(name for name, lo, hi in REGIMES if lo <= m <= hi)
