"""Feed mutated safetensors headers to the reader: it must answer with a header or a CheckpointError, and quickly.

    python bench/fuzz_headers.py [--count 100000] [--seed 0]

Mutations work on bytes (flips, cuts, insertions, repetition), on JSON values (huge, negative, wrong types, nesting) and
on structure (swapped offsets, duplicate names, lengths that lie). An accepted header must describe ranges inside the
file that do not overlap, and its tensors must be readable. Any other exception, or a header that takes over a second,
is a failure: exit 1.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from blockscale.checkpoint.byteio import read_bytes
from blockscale.checkpoint.header import MAX_HEADER, read_header
from blockscale.errors import CheckpointError, DtypeError

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "m.weight": {"dtype": "F8_E4M3", "shape": [4, 8], "data_offsets": [0, 32]},
    "m.weight_scale_inv": {"dtype": "F32", "shape": [1, 1], "data_offsets": [32, 36]},
    "n.weight": {"dtype": "BF16", "shape": [3], "data_offsets": [36, 42]},
    "empty": {"dtype": "I64", "shape": [0, 2], "data_offsets": [42, 42]},
}
DATA = bytes(range(42))
ODD: list[Any] = [
    0, 1, -1, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**400, 1.5, 1e308, True, False, None, "", "F32", "F4",
    "BOOL", [], {}, [[]], [0] * 100,
    [2**61, 2**61], [-1, 4], ["4"], {"a": 1}, "\u0000", "\ud83d\ude00", "../x", "a" * 5000,
]  # fmt: skip


def mutate_value(rng: random.Random, value: Any) -> Any:
    """Somewhere in the tree, something else."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        new = dict(value)
        action = rng.random()
        if action < 0.1:
            del new[key]
        elif action < 0.2:
            new[str(rng.choice(ODD))[:300]] = new.pop(key)
        elif action < 0.3:
            new[key] = value[rng.choice(list(value))]
        else:
            new[key] = mutate_value(rng, value[key])
        return new
    if isinstance(value, list) and value and rng.random() < 0.7:
        new_list = list(value)
        i = rng.randrange(len(new_list))
        new_list[i] = mutate_value(rng, new_list[i])
        return new_list
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-2, -1, 1, 2, 8, -8, 2**32])
    return rng.choice(ODD)


def mutate_bytes(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        at = rng.randrange(len(data))
        action = rng.randrange(5)
        if action == 0:
            data[at] = rng.randrange(256)
        elif action == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            del data[at : at + rng.randint(1, 16)]
        elif action == 3:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        else:
            piece = data[at : at + rng.randint(1, 64)]
            data[at:at] = piece * rng.randint(1, 8)
    return data


def case(rng: random.Random) -> bytes:
    header: Any = GOOD
    kind = rng.random()
    if kind < 0.6:
        for _ in range(rng.randint(1, 3)):
            header = mutate_value(rng, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if kind > 0.97:
        depth = rng.randint(1, 50_000)
        text = rng.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth])
    if 0.6 <= kind < 0.9:
        text = bytes(mutate_bytes(rng, bytearray(text)))
    if rng.random() < 0.05:
        text = text.replace(b'"n.weight"', b'"m.weight"')  # a name twice
    length = len(text)
    if rng.random() < 0.1:
        length = rng.choice([0, 1, length - 1, length + 1, MAX_HEADER, MAX_HEADER + 1, 2**31, 2**63, 2**64 - 1])
    data = DATA if rng.random() < 0.9 else DATA[: rng.randrange(len(DATA))] * rng.randint(0, 3)
    file = struct.pack("<Q", max(0, length)) + text + data
    if kind >= 0.9 and kind <= 0.97:
        file = bytes(mutate_bytes(rng, bytearray(file)))
    return file[: rng.randrange(len(file) + 1)] if rng.random() < 0.05 else file


def check(path: Path) -> str:
    """The outcome as a word. Raises AssertionError when an accepted header is not right."""
    try:
        header = read_header(path)
    except CheckpointError as e:
        if str(path) not in str(e):
            raise RuntimeError("the message does not name the file") from e
        return "refused"
    size = path.stat().st_size
    end = 0
    for info in header.tensors:
        assert end <= info.start <= info.end <= size, f"{info} lies outside the file or overlaps"
        end = info.end
        assert read_bytes(info).numel() == info.nbytes
        try:
            read_bytes(info).view(info.torch_dtype).reshape(info.shape)
        except DtypeError:
            continue  # FP4 and FP6 codes, for which torch has no dtype
    return "accepted"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        for i in range(options.count):
            file = case(rng)
            path.write_bytes(file)
            started = time.perf_counter()
            try:
                outcomes[check(path)] += 1
            except BaseException as e:
                print(f"case {i}: {type(e).__name__}: {e}\n{file[:400]!r}")
                return 1
            slowest = max(slowest, time.perf_counter() - started)
    print(f"{options.count} headers: {dict(outcomes)}, slowest {slowest * 1e3:.0f} ms")
    return 0 if slowest < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
