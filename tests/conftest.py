import signal
import zlib

import pytest
import torch

from blockscale import platform, registry

# A job that a shell starts in the background ignores Ctrl-C, and so would all that tests start to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed_from_test_id(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _nothing_patched_is_remembered(request):
    """Platforms, plans and kernels are found once a process: a test that patches what they were found from must meet
    no answer of before, and leave none of its own."""
    if "monkeypatch" not in request.fixturenames:
        yield
        return
    patches = request.getfixturevalue("monkeypatch")  # before this one, so that it is undone after
    _forget()
    yield
    patches.undo()
    _forget()


def _forget():
    platform.detect.cache_clear()
    platform._detect.cache_clear()
    registry.forget()
