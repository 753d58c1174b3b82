import zlib

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed_from_test_id(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
