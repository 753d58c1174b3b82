"""The tutorial's package, really installed: found, right, and found out when it is broken."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "backend-numba"


def install(tmp_path, change=("", "")):
    """Install a copy, with one piece of its loop replaced, into a folder of its own."""
    source, target = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    loop = source / "blockscale_numba" / "multiply.py"
    assert change[0] in loop.read_text()
    loop.write_text(loop.read_text().replace(*change))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--disable-pip-version-check", "--target", str(target), str(source)], check=True)
    return target


def run(site, *args):
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return install(tmp_path_factory.mktemp("numba"))


def test_it_is_found_and_explained(site):
    answer = run(site, "-m", "blockscale", "explain", "--shape", "192,576", "--json")
    rows = {row["kernel"]: row for row in json.loads(answer.stdout)["decisions"]}
    assert rows["numba.linear"]["accepted"]
    answer = run(site, "-m", "blockscale", "explain", "--shape", "192,576", "--platform", "xpu:bmg", "--json")
    rows = {row["kernel"]: row for row in json.loads(answer.stdout)["decisions"]}
    assert rows["numba.linear"]["reasons"] == ["runs on cpu, not on xpu"]


def test_it_conforms(site):
    answer = run(site, "-m", "blockscale", "conformance", "--kernel", "numba", "--workers", "1", "--json")
    report = json.loads(answer.stdout)
    assert report["failures"] == []
    assert report["kernels"] == {"numba.linear": report["passed"]}
    assert report["passed"] == 350
    assert answer.returncode == 0


def test_its_own_tests_are_one_import(site):
    tests = str(EXAMPLE / "tests")
    answer = run(
        site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tests, tests, "-k", "fp8_128x128 and 576"
    )
    assert answer.returncode == 0, answer.stdout
    assert "passed" in answer.stdout


def test_broken_on_purpose_it_fails(tmp_path):
    site = install(tmp_path, ("scale[n // rows, block]", "scale[n // rows, max(block - 1, 0)]"))
    answer = run(site, "-m", "blockscale", "conformance", "--kernel", "numba", "--quick")
    assert answer.returncode == 1
    assert "FAIL numba.linear: linear fp8_128x128 M=3 N=192 K=576 bfloat16 checkpoint plain (value)" in answer.stdout
    assert "at [" in answer.stdout
