"""Cases shared over processes: the same report, and a process that dies is a failure and no end."""

import json

import pytest

from blockscale import conformance
from blockscale.conformance.cases import Case, cases


def test_cases_survive_json():
    for case in cases():
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


def test_workers_find_what_one_process_finds():
    here = conformance.run("cpu", kernel="reference", quick=True)
    shared = conformance.run("cpu", kernel="reference", quick=True, workers=2)
    assert shared.failures == here.failures == []
    assert (shared.cases, shared.kernels, shared.untried) == (here.cases, here.kernels, 0)
    assert shared.max_error == here.max_error
    assert shared.row_error == here.row_error


def test_what_time_left_no_room_for_is_counted_and_not_green():
    for workers in (0, 1):
        report = conformance.run("cpu", kernel="reference", quick=True, workers=workers, seconds=0)
        assert report.cases == 0
        assert report.untried > 5
        assert not report.green
        assert f"{report.untried} cases not tried" in report.text()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process died of signal 11"),
        ("os._exit(3)", "the process ended with status 3"),
        ("raise RuntimeError('CUDA error: an illegal memory access')", "RuntimeError: CUDA error"),
    ],
)
def test_a_kernel_that_takes_its_process_down_fails_and_the_rest_goes_on(plugin, body, said):
    plugin.write(body)
    args = ("-m", "blockscale", "conformance", "--quick", "--workers", "1", "--json")
    result = plugin.python(*args)
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert [f["kernel"] for f in report["failures"]] == ["plugin.linear"] * 2  # a ragged case, and whole blocks
    assert said in report["failures"][0]["got"]
    assert report["kernels"]["reference.linear"] == 4
    assert report["passed"] > 10


def test_prints_of_a_kernel_do_not_disturb(plugin):
    plugin.write("print('hello')\nreturn super().run(problem, x, w, bias)")
    report = json.loads(plugin.python("-m", "blockscale", "conformance", "--quick", "--workers", "1", "--json").stdout)
    assert report["failed"] == 0
    assert report["kernels"]["plugin.linear"] == 2
