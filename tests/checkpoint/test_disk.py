"""A disk that is really full, and one that cannot be written: a small tmpfs in a mount namespace of its own."""

import re
import subprocess
import sys

import pytest

from blockscale.checkpoint import quantize_checkpoint

SHARD = "150K"


def on_a_small_disk(path, script):
    """Run a shell script with 600 KB mounted at `path`; `$Q DST` quantizes. Returns what it printed."""
    mount = f'set -e; mount -t tmpfs -o size=600k none {path}; Q="{sys.executable} -m blockscale quantize"; set +e; '
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "unshare" not in done.stderr
    assert "mount:" not in done.stderr
    return done


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_named_and_resumed(llama, disk, tmp_path, workers):
    """600 KB hold three of five shards. With more room the same command goes on, to the same bytes."""
    quantize_checkpoint(llama, tmp_path / "whole", "fp8_128x128", shard_size=150 << 10)
    run = f"$Q {llama} {disk}/out --shard-size {SHARD} --workers {workers}"
    done = on_a_small_disk(
        disk,
        f"""
        {run}; echo first $?; ls {disk}; ls {disk}/out.unfinished | grep partial
        mount -o remount,size=4m {disk}; {run}; echo second $?
        diff -r {disk}/out {tmp_path}/whole && echo same
        """,
    )
    # what a shard needs is known; the record that follows a shard may be what finds no room
    said = rf"error: No space left on device(, needs \d+ bytes, \d+ are free)?: {disk}/out.unfinished/(model|records)"
    assert re.search(said, done.stderr)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["first 2", "out.unfinished"]
    assert "from an earlier run" in done.stdout
    assert "partial" not in done.stdout
    assert lines[-2:] == ["second 0", "same"]


@pytest.mark.slow
def test_a_disk_without_room_for_anything(llama, disk):
    done = on_a_small_disk(disk, f"mount -o remount,size=4k {disk}; $Q {llama} {disk}/out; echo $?; ls {disk}")
    said = rf"error: No space left on device, needs \d+ bytes, 0 are free: {disk}/out.unfinished/model"
    assert re.search(said, done.stderr)
    assert done.stdout.splitlines() == ["2", "out.unfinished"]


@pytest.mark.slow
def test_a_read_only_disk(llama, disk):
    done = on_a_small_disk(disk, f"mount -o remount,ro {disk}; $Q {llama} {disk}/out; echo $?; ls {disk}")
    assert done.stderr == f"error: Read-only file system: {disk}/out.unfinished\n"
    assert done.stdout == "2\n"
