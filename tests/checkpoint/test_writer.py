"""A shard is the file that the safetensors library would write, and nothing when it fails."""

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint.header import DTYPES
from blockscale.checkpoint.writer import ShardWriter, Spec
from blockscale.errors import CheckpointError


def tensors():
    """One of every dtype, under names whose order is another one, and an empty one."""
    found = {}
    for i, dtype in enumerate(DTYPES.values()):
        size = 8 if dtype is torch.bool else 48
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
        found[f"t{i * 7 % 19:02d}é"] = raw.view(dtype).reshape(2, -1)
    return found | {"none": torch.empty(0, 3), "another": torch.ones(5)}


def specs(found):
    codes = {dtype: code for code, dtype in DTYPES.items()}
    return [Spec(name, codes[t.dtype], tuple(t.shape)) for name, t in found.items()]


def test_the_file_is_the_librarys(tmp_path):
    found = tensors()
    save_file(found, tmp_path / "theirs", metadata={"format": "pt"})
    with ShardWriter(tmp_path / "ours", specs(found)) as writer:
        for name, t in reversed(found.items()):  # pieces in another order
            for row in t:
                writer.write(name, row)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_pieces_that_do_not_fit(tmp_path):
    with (
        pytest.raises(CheckpointError, match="a: 12 bytes for the last 8"),
        ShardWriter(tmp_path / "m", [Spec("a", "F32", (2,))]) as writer,
    ):
        writer.write("a", torch.ones(3))
    with (
        pytest.raises(CheckpointError, match="a: 8 bytes were not written"),
        ShardWriter(tmp_path / "m", [Spec("a", "F32", (2,))]),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
