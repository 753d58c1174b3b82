"""Whatever is asked for, in whatever order, the bytes are the file's; and the page cache keeps what it had."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from blockscale.checkpoint import byteio
from blockscale.checkpoint.byteio import ByteReader, ByteWriter, read_bytes
from blockscale.checkpoint.header import read_header
from blockscale.errors import CheckpointError


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Three tensors that begin and end within windows (of 4 KB here), and their bytes."""
    monkeypatch.setattr(byteio, "_WINDOW", 4096)
    g = torch.Generator().manual_seed(0)
    data = {name: torch.randint(0, 256, (n,), dtype=torch.uint8, generator=g) for name, n in SIZES.items()}
    save_file(data, tmp_path / "x.safetensors")
    return [(info, data[info.name]) for info in read_header(tmp_path / "x.safetensors").tensors]


SIZES = {"a": 100, "b": 50_000, "c": 12_345}


@pytest.mark.parametrize("step", [1000, 4096, 5000, 9000, 60_000])
@pytest.mark.parametrize("again", [False, True])
def test_pieces_in_order(stored, step, again):
    for info, want in stored:
        with ByteReader(info, again) as reader:
            pieces = [reader.read(at, min(at + step, info.nbytes)).clone() for at in range(0, info.nbytes, step)]
        assert torch.equal(torch.cat(pieces), want)
        assert torch.equal(read_bytes(info), want)


def test_any_order_and_overlaps(stored):
    info, want = stored[1]
    with ByteReader(info) as reader:
        for begin, end in [
            (0, 10),
            (5, 9000),
            (30_000, 30_001),
            (29_000, 50_000),
            (0, 50_000),
            (49_999, 50_000),
            (7, 7),
        ]:
            assert torch.equal(reader.read(begin, end), want[begin:end])


def test_a_system_that_does_not_know_the_flag(stored, tmp_path, monkeypatch):
    read, write, refused = os.preadv, os.pwritev, []

    def old(call):
        def wrapped(fd, buffers, offset, flags=0):
            if flags:
                refused.append(flags)
                raise OSError(errno.EOPNOTSUPP, "not supported")
            return call(fd, buffers, offset)

        return wrapped

    monkeypatch.setattr(os, "preadv", old(read))
    monkeypatch.setattr(os, "pwritev", old(write))
    for info, want in stored:
        assert torch.equal(read_bytes(info), want)
    with (tmp_path / "y").open("wb") as f:
        out = ByteWriter(f.fileno())
        out.write(b"abc", 3)
        out.write(b"xyz", 0)
    assert (tmp_path / "y").read_bytes() == b"xyzabc"
    assert refused  # and was asked once for each file at most
    assert len(refused) <= len(stored) + 1


def test_other_errors_are_not_swallowed(tmp_path):
    with (tmp_path / "y").open("wb") as f, pytest.raises(OSError, match="File too large|Invalid argument"):
        ByteWriter(f.fileno()).write(b"abc", 2**63 - 2)


def test_a_file_that_ends(stored):
    info, _ = stored[1]
    with info.file.open("r+b") as f:
        f.truncate(info.start + 20_000)
    with pytest.raises(CheckpointError, match=rf"b: the file ended at byte {info.start + 20_000}, needs {info.end}"):
        read_bytes(info)
