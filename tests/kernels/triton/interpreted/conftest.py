"""The interpreter computes with numpy, which warns where a GPU gives NaN or infinity; those values are compared."""

import pytest
import torch

from blockscale.platform import Platform


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")


@pytest.fixture
def platform():
    """No FP8 instruction, no fused multiply-add, no bf16: what the interpreter is."""
    return Platform.parse("cpu")


@pytest.fixture
def g(request):
    return torch.Generator().manual_seed(sum(map(ord, request.node.nodeid)))
