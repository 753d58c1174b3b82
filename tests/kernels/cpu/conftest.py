"""Fixtures of the CPU kernels' tests."""

import pytest
import torch

import native_cases
from blockscale.kernels.cpu import native


def use(name):
    """Let the native library use an instruction set, and put back the one before."""
    library, before = native.library(), native.isa()
    assert library.blockscale_use(name.encode()) == 0
    yield name
    library.blockscale_use(before.encode())


@pytest.fixture(params=native_cases.usable())
def isa(request):
    """Each instruction set in turn."""
    yield from use(request.param)


@pytest.fixture(params=[name for name in native_cases.usable() if name.startswith("avx")])
def int16_isa(request):
    """Each instruction set that cpu.int16 is written for."""
    yield from use(request.param)


@pytest.fixture
def poisoned(monkeypatch):
    """The outputs that a kernel may write are full of NaN before."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).view(torch.uint8).fill_(0xFF).view(k["dtype"]))
