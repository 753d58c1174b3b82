import json
import struct

import pytest

from makers import make_deepseek_v3, make_deepseek_v4, make_llama, make_minimax_m2, make_qwen3_moe
from threads import one_thread

MODELS = {
    "v3": (make_deepseek_v3, {"mtp": False}),
    "v31": (make_deepseek_v3, {"ue8m0": True, "ragged_k": True, "mtp": False}),
    "v32": (make_deepseek_v3, {"v32": True}),
    "v4": (make_deepseek_v4, {"mtp": False}),
    "v4_base": (make_deepseek_v4, {"experts": "fp8", "compressor_fp8": True, "mtp": False}),
    "v4_nvfp4": (make_deepseek_v4, {"experts": "nvfp4"}),
    "v41": (make_deepseek_v4, {"block": 32, "nested": True, "mtp": False}),
    "qwen3": (make_qwen3_moe, {"intermediate": 192}),
    "minimax": (make_minimax_m2, {}),
    "llama": (make_llama, {"layers": 1}),
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Path of a tiny model by name, in two shards, made once. Read only."""
    made = {}

    def get(name):
        if name not in made:
            make, options = MODELS[name]
            made[name] = make(tmp_path_factory.mktemp("models") / name, shards=2, **options)
        return made[name]

    return get


@pytest.fixture(scope="session")
def llama(models):
    """A BF16 Llama in two shards; N=192 and K=192 are ragged. Read only."""
    return models("llama")


@pytest.fixture
def raw_file(tmp_path):
    """Write a safetensors file from a header (dict or bytes) and data bytes."""

    def write(header, data=b"", name="model.safetensors", length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / name
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return path

    return write
