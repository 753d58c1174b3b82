import json
import struct

import pytest

from makers import make_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A BF16 Llama in two shards; N=192 and K=192 are ragged. Read only."""
    return make_llama(tmp_path_factory.mktemp("llama") / "src", shards=2, layers=1)


@pytest.fixture
def raw_file(tmp_path):
    """Write a safetensors file from a header (dict or bytes) and data bytes."""

    def write(header, data=b"", name="model.safetensors", length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / name
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return path

    return write
