"""The strict header reader: what safetensors writes is read, everything else is a CheckpointError."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint.header import read_header
from blockscale.errors import CheckpointError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [24, 28]},
}


def changed(name, **fields):
    header = json.loads(json.dumps(GOOD))
    header[name].update(fields)
    return header


def test_reads_what_the_library_writes(tmp_path):
    tensors = {
        "w": torch.zeros(3, 5, dtype=torch.float8_e4m3fn),
        "s": torch.ones(1, 1, dtype=torch.float8_e8m0fnu),
        "e": torch.zeros(0, 4),
        "x": torch.tensor(7, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "m.safetensors")
    assert {t.name: (t.dtype, t.shape, t.nbytes) for t in header.tensors} == {
        "w": ("F8_E4M3", (3, 5), 15),
        "s": ("F8_E8M0", (1, 1), 1),
        "e": ("F32", (0, 4), 0),
        "x": ("I64", (), 8),
    }
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("header", "size", "says"),
    [
        (changed("a", data_offsets=[0, 25]), 28, "a: F32 [2, 3] needs 24 bytes, data_offsets has 25"),
        (changed("a", shape=[2, 4]), 28, "a: F32 [2, 4] needs 32 bytes"),
        (changed("b", data_offsets=[20, 24]), 28, "b: data starts at byte"),
        (changed("b", data_offsets=[25, 29]), 29, "leaves a hole"),
        (changed("b", data_offsets=[24, 1 << 40]), 28, "b: data ends at byte"),
        (changed("b", data_offsets=[28, 24]), 28, "b: data_offsets needs [begin, end]"),
        (changed("b", data_offsets=[-4, 0]), 28, "b: data_offsets needs [begin, end]"),
        (changed("b", data_offsets=[24.0, 28.0]), 28, "b: data_offsets needs"),
        (changed("b", data_offsets=[24]), 28, "b: data_offsets needs"),
        (changed("b", data_offsets="24"), 28, "b: data_offsets needs"),
        (changed("a", shape=[True, 6]), 28, "a: shape needs"),
        (changed("a", shape=[-2, -3]), 28, "a: shape needs"),
        (changed("a", shape=[1 << 62, 1 << 62]), 28, "a: shape needs"),
        (changed("a", shape=[1 << 61, 1 << 61]), 28, "a: shape is beyond any memory"),
        (changed("a", shape=None), 28, "a: shape needs"),
        (changed("a", dtype="F31"), 28, "a: unknown dtype 'F31'"),
        (changed("a", dtype=["F32"]), 28, "a: unknown dtype"),
        (changed("a", more=1), 28, "a: needs dtype, shape and data_offsets"),
        ({"a": 3}, 0, "a: needs dtype, shape and data_offsets"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__ needs"),
        ({"__metadata__": []}, 0, "__metadata__ needs"),
        ([1, 2], 0, "needs a JSON object"),
        (b"{", 0, "not JSON"),
        (b"\xff\xfe{}", 0, "not JSON"),
        (b'{"a": NaN}', 0, "NaN is not JSON"),
        (b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": {}}', 4, "'a' appears twice"),
        (b"[" * 100_000, 0, "not JSON"),
        (b'{"a": {"shape": [' + b"9" * 5000 + b"]}}", 0, "not JSON"),
        (GOOD, 27, "b: data ends at byte"),
        (GOOD, 29, "tensors end at byte"),
    ],
)
def test_lies_are_refused(raw_file, header, size, says):
    path = raw_file(header, bytes(size))
    with pytest.raises(CheckpointError) as e:
        read_header(path)
    assert says in str(e.value)
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x01\x00", "truncated: 2 bytes"),
        (struct.pack("<Q", 100) + b"{}", "truncated: header claims 100 bytes, the file has 2"),
        (struct.pack("<Q", 1 << 63) + b"{}", "header claims 9223372036854775808 bytes"),
    ],
)
def test_truncated_and_huge_headers(tmp_path, content, says):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_header(path)


def test_mutated_headers_never_crash(tmp_path):
    """A small cousin of bench/fuzz_headers.py: 1,000 mutations end in a header or in a CheckpointError."""
    save_file({"w": torch.zeros(8, 8), "s": torch.ones(1, 1), "n": torch.zeros(3)}, tmp_path / "seed.safetensors")
    seed = (tmp_path / "seed.safetensors").read_bytes()
    rng, path = random.Random(5), tmp_path / "m.safetensors"
    refused = 0
    for _ in range(1000):
        data = bytearray(seed)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 250))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
        try:
            header = read_header(path)
        except CheckpointError:
            refused += 1
        else:
            size = path.stat().st_size
            assert all(0 <= t.start <= t.end <= size for t in header.tensors)
    assert refused > 500
