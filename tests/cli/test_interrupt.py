"""Ctrl-C at any moment of a command is exit code 130 and no traceback, also while torch is being imported."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blockscale import interrupt, observe
from blockscale.cli import main

SOURCE = Path(__file__).parents[2] / "src"
ASKED = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('still here', flush=True)\n"
SCRIPT = "import sys\nfrom blockscale.cli import main\nsys.exit(main())\n"


@pytest.fixture
def interrupted(tmp_path):
    """Run Python with a torch that is interrupted as soon as it is imported; `blockscale` is the installed script."""
    (tmp_path / "torch.py").write_text(ASKED)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/blockscale"
    script.write_text(SCRIPT)

    def run(*args, **variables):
        env = {k: v for k, v in os.environ.items() if k != "RANK"} | variables
        env["PYTHONPATH"] = f"{tmp_path}:{SOURCE}"
        command = [sys.executable, *(str(script) if arg == "blockscale script" else arg for arg in args)]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)

    return run


@pytest.mark.parametrize(
    "args",
    [("-m", "blockscale"), ("-u", "-m", "blockscale", "run", "a b", "-m"), ("blockscale script", "doctor", "--json")],
    ids=" ".join,
)
def test_while_torch_is_imported(interrupted, args):
    done = interrupted(*args)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_one_rank_speaks_for_all(interrupted):
    done = interrupted("-m", "blockscale", "doctor", RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("args", [("-c", "import blockscale"), ("-c", "import blockscale", "-m", "blockscale", "run")])
def test_a_program_that_imports_the_package_keeps_its_own_ways(interrupted, args):
    done = interrupted(*args)
    assert "KeyboardInterrupt" in done.stderr
    assert "still here" not in done.stdout


def test_a_command_in_the_background_ignores_it(interrupted):
    start = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    done = interrupted("-c", start, sys.executable, "-m", "blockscale")
    assert "still here" in done.stdout


def test_main_takes_over(monkeypatch, capsys):
    before = signal.signal(signal.SIGINT, interrupt._leave)
    try:
        monkeypatch.setattr(observe, "configure", lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (stop.value.code, capsys.readouterr().err) == (130, "interrupted\n")
