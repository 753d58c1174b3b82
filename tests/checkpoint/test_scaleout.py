"""Workers, ranks and kills: the result never depends on them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from blockscale.checkpoint import quantize_checkpoint
from blockscale.checkpoint.errors import NotFiniteError
from blockscale.checkpoint.ranks import divide
from blockscale.errors import BlockscaleError

OPTIONS = {"shard_size": 100_000}


def everything(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_shards_are_divided_by_bytes():
    assert divide([5, 1, 4, 2, 3], 2) == [[0, 1, 3], [2, 4]]
    groups = divide(list(range(100)), 7)
    sums = [sum(group) for group in groups]
    assert max(sums) - min(sums) <= 99
    assert sorted(i for group in groups for i in group) == list(range(100))
    assert divide([1], 3) == [[0], [], []]


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "out"
    quantize_checkpoint(llama, path, "fp8_128x128", **OPTIONS)
    return everything(path)


def test_two_workers_write_the_same_bytes(llama, whole, tmp_path):
    events = []
    result = quantize_checkpoint(
        llama, tmp_path / "out", "fp8_128x128", workers=2, listen=lambda e: events.append(e["event"]), **OPTIONS
    )
    assert everything(tmp_path / "out") == whole
    assert events.count("shard") == result.shards
    assert (events[0], events[-1]) == ("start", "done")


def test_an_error_in_a_worker_is_the_error_of_the_run(tmp_path):
    import torch
    from safetensors.torch import save_file

    src = tmp_path / "src"
    src.mkdir()
    bad = torch.ones(128, 128)
    bad[3, 4] = torch.nan
    save_file({"a.weight": torch.ones(128, 128), "b.weight": bad}, src / "model.safetensors")
    with pytest.raises(NotFiniteError, match=r"src/model.safetensors: b.weight: nan at \[3, 4\]"):
        quantize_checkpoint(src, tmp_path / "out", "fp8_128x128", workers=2, shard_size=1)
    with pytest.raises(BlockscaleError, match="needs at least 1"):
        quantize_checkpoint(src, tmp_path / "out", "fp8_128x128", workers=0)


def test_an_interrupt_of_the_whole_group_is_one_line(llama, tmp_path):
    """Ctrl-C reaches workers too, which may still import torch; what is there is kept for the next run."""
    command = [sys.executable, "-m", "blockscale", "quantize", str(llama), str(tmp_path / "out"), "--workers", "2"]
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    while not (tmp_path / "out.unfinished" / "job.json").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGINT)
    said = job.communicate(timeout=60)[1]
    assert (job.returncode, said) in ((130, "interrupted; the same command goes on from here\n"), (0, ""))


@pytest.mark.slow
def test_two_ranks_of_torchrun_write_the_same_bytes(llama, whole, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        from blockscale.checkpoint import quantize_checkpoint
        result = quantize_checkpoint({str(llama)!r}, {str(tmp_path / "out")!r}, "fp8_128x128", shard_size=100_000)
        print("shards", result.shards)
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shards") == 2
    assert everything(tmp_path / "out") == whole


def test_killed_at_any_moment(llama, whole, tmp_path):
    """SIGKILL at two moments; bench/kill_quantize.py does it fifty times."""
    command = [sys.executable, "-m", "blockscale", "quantize", str(llama), str(tmp_path / "out"), "--json"]
    command += ["--shard-size", "100000"]
    for shards in (1, 4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        seen = 0
        for line in process.stdout:
            seen += '"shard"' in line
            if seen == shards:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        kept = len(list((tmp_path / "out.unfinished" / "records").iterdir()))
        assert kept >= shards
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert everything(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c(llama, whole, tmp_path, workers):
    """Exit code 130, one line, nothing half-written, and the same command goes on."""
    command = [sys.executable, "-m", "blockscale", "quantize", str(llama), str(tmp_path / "out"), "--json"]
    command += ["--shard-size", "100000", "--workers", workers]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if '"shard"' in line:
            process.send_signal(signal.SIGINT)
            break
    _, said = process.communicate()
    assert (process.returncode, said) == (130, "interrupted; the same command goes on from here\n")
    unfinished = [p.name for p in (tmp_path / "out.unfinished").iterdir()]
    assert not any(name.endswith(".partial") for name in unfinished)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    done = json.loads(again.stdout.splitlines()[-1])
    assert (done["event"], done["measured"], done["kept"] >= 1) == ("done", 7, True)
    assert everything(tmp_path / "out") == whole


@pytest.mark.slow
def test_workers_end_with_their_parent(llama, tmp_path):
    """kill -9 of the parent leaves no worker writing."""
    command = [sys.executable, "-m", "blockscale", "quantize", str(llama), str(tmp_path / "out"), "--json"]
    command += ["--shard-size", "100000", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if '"shard"' in line:
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    alive = [int(pid) for pid in children.stdout.split()]
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if os.path.exists(f"/proc/{pid}") and not _zombie(pid)]
        time.sleep(0.05)
    assert alive == []


def _zombie(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
