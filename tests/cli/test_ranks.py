"""One voice under torchrun: what is wrong with a command is wrong for all ranks of a host, and the first one says so.

tests/parallel/test_torchrun.py does it with torchrun itself.
"""

import signal
import subprocess
import sys

import pytest
import torch

from blockscale import BlockscaleError
from blockscale.cli import _ranks, main
from blockscale.parallel import joined

WRONG = (["run", "/nowhere", "hello"], ["run", "--sums", "none"], ["bench", "model", "/nowhere"])


@pytest.fixture
def rank(monkeypatch):
    """Make this process a rank of three; its signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def become(number):
        for name, value in (("WORLD_SIZE", 3), ("RANK", number), ("LOCAL_RANK", number)):
            monkeypatch.setenv(name, str(value))

    yield become
    for number, handler in handlers.items():
        signal.signal(number, handler)


def end(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["blockscale", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.parametrize(("number", "patience"), [(0, 1e6), (2, 0)], ids=["the first", "another, later"])
@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_the_first_rank_speaks_at_once_and_another_where_it_has_nothing_to_say(
    args, number, patience, rank, monkeypatch, capsys
):
    """A message must not be lost because a mistake turned out to be one rank's alone."""
    rank(number)
    monkeypatch.setattr(_ranks, "PATIENCE", patience)
    assert end(args, monkeypatch) == 2
    assert "rror" in capsys.readouterr().err


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_another_waits_to_be_ended(args, rank, monkeypatch, capsys):
    class Waiting(BaseException):
        pass

    def wait(seconds):
        raise Waiting

    rank(2)
    monkeypatch.setattr(_ranks.time, "sleep", wait)
    monkeypatch.setattr(sys, "argv", ["blockscale", *args])
    with pytest.raises(Waiting):
        main()
    assert capsys.readouterr().err == ""


def test_ranks_without_a_device_end_before_they_join(rank, monkeypatch):
    rank(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BlockscaleError, match="device cuda: torch .* finds none"), joined("cuda"):
        pass


def test_help_is_for_every_rank(rank, monkeypatch, capsys):
    rank(1)
    assert end(["run", "--help"], monkeypatch) == 0
    assert "Usage" in capsys.readouterr().out


def test_one_that_waits_leaves_with_the_others_code():
    code = """
import signal
from blockscale.cli import _ranks
_ranks.time.sleep = lambda seconds: (print("waits", flush=True), signal.pause())
_ranks.let_the_first_speak()
"""
    env = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout.readline() == "waits\n"
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(60) == 2
