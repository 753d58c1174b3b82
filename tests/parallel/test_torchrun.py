"""Commands under torchrun: as on one device, and ending together. Slow: every process imports transformers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.slow
SOURCE = Path(__file__).parents[2] / "src"
PROMPT = "w5 w6 w7"
TIMEOUT = 5
"""Seconds that the commands are given as --timeout."""
START = 120
"""Seconds that processes may take to start on a busy machine."""


def environment():
    return os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def torchrun(ranks, *args, prefix=(), options=("--standalone",)):
    return [
        *prefix, sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks),
        "-m", "blockscale", *map(str, args),
    ]  # fmt: skip


def run(command):
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=2 * START)


def start(command, log):
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), start_new_session=True)


def wait_for_text(path, size, seconds=START):
    deadline = time.monotonic() + seconds
    while path.stat().st_size < size:
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.1)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def end(process):
    """Whatever is left of a process group that this test started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


@pytest.fixture(scope="module")
def tokenized(folders):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for folder in folders.values():
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folders


@pytest.mark.parametrize("name", ["v3", "v4", "qwen3"])
def test_run_gives_the_same_text_once(tokenized, name):
    args = (
        "run",
        tokenized[name],
        PROMPT,
        "--max-new-tokens",
        6,
        "--json",
        "--numerics",
        "weight_only",
        "--dtype",
        "float32",
    )
    one = json.loads(run([sys.executable, "-m", "blockscale", *map(str, args)]).stdout)
    two = json.loads(run(torchrun(2, *args)).stdout)
    assert two["text"] == one["text"]
    assert two["ranks"]["ranks"] == 2
    assert two["ranks"]["sums"] == {
        "how": "backend", "reason": "gloo: cpu devices: only cuda devices share memory in this version",
    }  # fmt: skip
    assert two["resident_weight_bytes"] < one["resident_weight_bytes"]


def test_direct_sums_that_cannot_be_are_refused_with_the_reason(tokenized):
    result = run(torchrun(2, "run", tokenized["v3"], PROMPT, "--sums", "direct"))
    said = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "sums=direct: cpu devices: only cuda devices share memory in this version" in said[0]
    assert result.returncode != 0


def test_bench_model_over_ranks(tokenized):
    result = run(torchrun(2, "bench", "model", tokenized["qwen3"], "--prompt-tokens", 8, "--new-tokens", 3, "--json"))
    report = json.loads(result.stdout)
    assert report["ranks"]["expert_groups"] == 2
    assert report["decode_tokens_per_second"] > 0


def test_an_error_on_one_rank_ends_all_with_its_message_once(tokenized, tmp_path):
    for file in tokenized["v3"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.experts.6.up_proj.weight_scale_inv"][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    result = run(torchrun(2, "run", tmp_path, PROMPT, "--timeout", TIMEOUT))
    said = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "rank 1 of 2" in said[0]
    assert "experts.6.up_proj.weight_scale_inv: scales must be finite" in said[0]
    assert result.returncode != 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("run", "{v3}", PROMPT, "--device", "nope"), "error: device 'nope': need cpu, cuda, xpu or another"),
        (("run", "{v3}", PROMPT, "--sums", "none"), "Invalid value for '--sums'"),
        (("run", "{v3}", PROMPT, "--numerics", "none"), "error: unknown numerics"),
        (("bench", "model", "{v3}/none"), "v3/none: no such checkpoint"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_what_is_wrong_with_the_command_is_said_once_and_ends_all_with_2(folders, args, said):
    result = run(torchrun(3, *(arg.format(v3=folders["v3"]) for arg in args)))
    assert result.stderr.count(said) == 1, result.stderr
    assert result.stderr.count("exitcode  : 2 ") == 3, result.stderr
    assert "Traceback" not in result.stderr.split("torch/distributed/elastic")[0]


def test_the_first_rank_says_what_another_met_in_its_share_of_a_job(tmp_path):
    (tmp_path / "src").mkdir()
    for name, value in (("a", 1.0), ("b", float("nan"))):  # the larger file is rank 0's
        save_file({f"{name}.weight": torch.full((300 - ord(name), 256), value)}, tmp_path / f"src/{name}.safetensors")
    result = run(torchrun(2, "quantize", tmp_path / "src", tmp_path / "out", "--shard-size", "1K"))
    said = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1, result.stderr
    assert said[0].startswith("error: write: rank 1 of 2: ")
    assert "src/b.safetensors: b.weight: nan at [0, 0]" in said[0]


@pytest.mark.parametrize(("which", "sent"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_rank_ends_the_run_within_the_timeout(tokenized, tmp_path, which, sent):
    """Killed, or alive and silent. torchrun itself waits 30 s more for a process that does not even take SIGTERM."""
    log = tmp_path / "log"
    with log.open("w") as out:
        process = start(
            torchrun(2, "run", tokenized["v3"], PROMPT, "--max-new-tokens", 4000, "--timeout", TIMEOUT), out
        )
    try:
        wait_for_text(log, 300)
        lost = children(process.pid)[which]
        os.kill(lost, sent)
        begin = time.monotonic()
        while "error: rank" not in log.read_text():
            assert time.monotonic() - begin < 2 * TIMEOUT, log.read_text()[-3000:]
            time.sleep(0.1)
        assert f"error: rank {which} of 2 died or hangs: no sign of life" in log.read_text()
    finally:
        end(process)


def test_interrupt_is_one_word(tokenized, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as out:
        process = start(torchrun(2, "run", tokenized["v3"], PROMPT, "--max-new-tokens", 4000), out)
    try:
        wait_for_text(log, 300)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(START) != 0
        text = log.read_text()
        assert text.splitlines().count("interrupted") == 1
        assert "Traceback" not in text.split("interrupted")[0]
    finally:
        end(process)


# -- several nodes: network namespaces with a cable between them ---------------------------------------------------


def ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True)


@pytest.fixture
def nodes():
    """Two namespaces with addresses of their own, joined by a virtual cable. Needs root."""
    names = (f"bsa{os.getpid() % 100000}", f"bsb{os.getpid() % 100000}")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.211.77.{number}/24", "dev", "v0")
            ip("-n", name, "link", "set", "v0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_nodes(names, ranks, args, logs):
    """torchrun on each node; the first one is the meeting point."""
    found = []
    for number, name in enumerate(names):
        meeting = ("--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", "10.211.77.1:29411")
        meeting += ("--rdzv-conf", f"is_host={number == 0}", "--local-addr", f"10.211.77.{number + 1}")
        options = ("--nnodes", "2", "--node-rank", str(number), *meeting)
        command = torchrun(
            ranks, *args, prefix=("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=v0"), options=options
        )
        with logs[number].open("w") as out:
            found.append(start(command, out))
    return found


def test_two_nodes_give_the_text_of_one_process(tokenized, nodes, tmp_path):
    args = ("run", tokenized["qwen3"], PROMPT, "--max-new-tokens", 6, "--numerics", "weight_only", "--dtype", "float32")
    one = run([sys.executable, "-m", "blockscale", *map(str, args)]).stdout.splitlines()[0]
    logs = [tmp_path / "a", tmp_path / "b"]
    processes = on_nodes(nodes, 2, args, logs)
    try:
        assert [p.wait(2 * START) for p in processes] == [0, 0], [log.read_text()[-2000:] for log in logs]
    finally:
        for process in processes:
            end(process)
    said = [log.read_text() for log in logs]
    assert sum(one in text for text in said) == 1
    assert "ranks" in next(text for text in said if one in text)


def test_a_rank_killed_on_one_node_ends_both(tokenized, nodes, tmp_path):
    logs = [tmp_path / "a", tmp_path / "b"]
    args = ("run", tokenized["v3"], PROMPT, "--max-new-tokens", 4000, "--timeout", TIMEOUT)
    processes = on_nodes(nodes, 1, args, logs)
    try:
        deadline, said = time.monotonic() + START, [0, 0]
        while max(said) < 50:  # rank 0, on either node, is writing its text
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            time.sleep(0.1)
            said = [log.read_text().count(" w") for log in logs]
        speaking = said.index(max(said))
        os.kill(children(processes[1 - speaking].pid)[0], signal.SIGKILL)
        begin = time.monotonic()
        while "error: rank 1 of 2 died or hangs" not in logs[speaking].read_text():
            assert time.monotonic() - begin < 2 * TIMEOUT, logs[speaking].read_text()[-3000:]
            time.sleep(0.1)
        assert all(process.wait(START) != 0 for process in processes)
    finally:
        for process in processes:
            end(process)
