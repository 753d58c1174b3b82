"""Ranks and tiny checkpoints, made once for all tests here."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # ranks and rank_checks, also for the ranks' own processes
os.environ.setdefault("OMP_NUM_THREADS", "1")

from makers import make_deepseek_v3, make_deepseek_v4, make_qwen3_moe
from threads import one_thread

MODELS = {
    "v3": (make_deepseek_v3, {"ragged_k": True}),  # MLP of 320, N = 576
    "v4": (make_deepseek_v4, {}),
    "qwen3": (make_qwen3_moe, {"intermediate": 192}),
}
SIZES = ((2, 2), (3, 3), (4, 2), (8, 8))
"""Ranks and expert groups."""


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="package")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name, **options) for name, (make, options) in MODELS.items()}


@pytest.fixture(scope="module", params=SIZES, ids=lambda s: f"{s[0]}-ranks")
def ranks(request):
    from ranks import Ranks

    made = Ranks(*request.param)
    yield made
    made.close()
