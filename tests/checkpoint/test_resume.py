"""Runs that are interrupted, refused or repeated: DST is absent or complete, and the work done is kept."""

import os
import shutil

import pytest

from blockscale.checkpoint import open_checkpoint, quantize_checkpoint
from blockscale.checkpoint.errors import DestinationError
from blockscale.errors import CheckpointError


def everything(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_a_complete_destination_is_left_alone(llama, tmp_path):
    first = quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128")
    assert (first.existed, again.existed) == (False, True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_any_other_destination_is_refused(llama, tmp_path):
    quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128")
    before = everything(tmp_path / "out")
    with pytest.raises(DestinationError, match="format=mxfp8"):
        quantize_checkpoint(llama, tmp_path / "out", "mxfp8")
    assert everything(tmp_path / "out") == before
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    with pytest.raises(DestinationError, match="was not made by blockscale"):
        quantize_checkpoint(llama, stranger, "fp8_128x128")
    assert everything(stranger) == {"notes.txt": b"mine"}
    with pytest.raises(DestinationError, match="was not made by blockscale"):
        quantize_checkpoint(llama, llama, "fp8_128x128")


def test_an_empty_destination_is_filled(llama, tmp_path):
    (tmp_path / "out").mkdir()
    quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128")
    assert open_checkpoint(tmp_path / "out").layers


def interrupted_at(event_name, count):
    """A listener that raises KeyboardInterrupt at the count-th event of that name."""
    seen = [0]

    def listen(event):
        seen[0] += event["event"] == event_name
        if seen[0] == count:
            raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize(("event", "count"), [("advance", 1), ("advance", 4), ("shard", 1), ("shard", 3)])
def test_an_interrupted_run_is_resumed(llama, tmp_path, event, count):
    options = {"shard_size": 100_000}
    quantize_checkpoint(llama, tmp_path / "whole", "fp8_128x128", **options)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128", listen=interrupted_at(event, count), **options)
    assert not (tmp_path / "out").exists()
    result = quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128", **options)
    assert result.kept == (count if event == "shard" else result.kept)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert not (tmp_path / "out.unfinished").exists()


def test_a_damaged_shard_of_an_unfinished_run_is_made_again(llama, tmp_path):
    quantize_checkpoint(llama, tmp_path / "whole", "fp8_128x128", shard_size=100_000)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            llama, tmp_path / "out", "fp8_128x128", shard_size=100_000, listen=interrupted_at("shard", 3)
        )
    shard = sorted((tmp_path / "out.unfinished").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128", shard_size=100_000)
    assert result.kept == 2
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


def test_a_changed_source_is_noticed(llama, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(llama, src)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(src, tmp_path / "out", "fp8_128x128", shard_size=100_000, listen=interrupted_at("shard", 3))
    shard = sorted(src.glob("*.safetensors"))[0]
    times = shard.stat()
    flip_a_byte(shard)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))  # even when the time of change is put back
    with pytest.raises(DestinationError, match="the source changed: .* has other values"):
        quantize_checkpoint(src, tmp_path / "out", "fp8_128x128", shard_size=100_000)
    flip_a_byte(shard)  # a touched source with the same content is the same source
    quantize_checkpoint(src, tmp_path / "out", "fp8_128x128", shard_size=100_000)
    shutil.copytree(src, tmp_path / "copy")
    assert quantize_checkpoint(tmp_path / "copy", tmp_path / "out", "fp8_128x128", shard_size=100_000).existed
    (src / "config.json").write_text("{}")
    with pytest.raises(DestinationError, match="the source changed: config.json is not what it was"):
        quantize_checkpoint(src, tmp_path / "out", "fp8_128x128", shard_size=100_000)


def test_a_second_run_beside_the_first_is_refused(llama, tmp_path):
    refused = []

    def listen(event):
        if event["event"] == "shard" and not refused:
            with pytest.raises(DestinationError, match="another run is writing here"):
                quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128")
            refused.append(True)

    quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128", listen=listen)
    assert refused == [True]


def test_a_full_disk_leaves_a_run_to_resume(llama, tmp_path, monkeypatch):
    """The second shard finds no room: the error of the system, the first shard kept for later."""
    quantize_checkpoint(llama, tmp_path / "whole", "fp8_128x128", shard_size=100_000)
    real, calls = os.posix_fallocate, []

    def full(fd, offset, size):
        calls.append(size)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128", shard_size=100_000)
    assert not (tmp_path / "out").exists()
    assert quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128", shard_size=100_000).kept == 1
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("/proc/blockscale/out", OSError, "blockscale"),
        ("/dev/null/out", DestinationError, "/dev/null/out: needs a folder to lie in, /dev/null is a file"),
    ],
)
def test_targets_that_cannot_be_written(llama, where, error, message):
    with pytest.raises(error, match=message):
        quantize_checkpoint(llama, where, "fp8_128x128")


def test_a_truncated_shard_names_itself(llama, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(llama, src)
    shard = src / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: .*truncated, or the header lies"):
        quantize_checkpoint(src, tmp_path / "out", "fp8_128x128")


@pytest.mark.parametrize("call", ["job.sync_folder", "job.write_json", "job.tell_start"])
def test_killed_between_any_two_files(llama, tmp_path, monkeypatch, call):
    """At the end the request goes before the folder gets its name, at the beginning it comes before everything else."""
    from blockscale.checkpoint import job

    options = {"shard_size": 100_000}
    quantize_checkpoint(llama, tmp_path / "whole", "fp8_128x128", **options)
    name = call.removeprefix("job.")
    real = getattr(job, name)
    for fatal in range(12):
        calls = iter(range(1000))

        def dying(*args, fatal=fatal, calls=calls):
            if next(calls) == fatal:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(job, name, dying)
        try:
            quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128", **options)
        except KeyboardInterrupt:
            monkeypatch.setattr(job, name, real)
            quantize_checkpoint(llama, tmp_path / "out", "fp8_128x128", **options)
        assert everything(tmp_path / "out") == everything(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")
