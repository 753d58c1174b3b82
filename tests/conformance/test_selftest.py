"""Kernels tried before their first use, in processes that have never seen them."""

import json

import pytest
import torch

import blockscale
from blockscale import NoKernelError, registry, verdicts
from blockscale.conformance import selftest
from blockscale.kernels.reference import Linear
from blockscale.platform import Platform, detect, identity

USE = """
import torch, blockscale
from blockscale import observe
w = blockscale.quantize(torch.ones(192, 256), "fp8_128x128", kernel="reference")
blockscale.linear(torch.ones(2, 256), w)
print(dict(observe.calls))
"""


def explained(plugin, **env):
    args = ("-m", "blockscale", "explain", "--shape", "192,256", "--json")
    rows = json.loads(plugin.python(*args, **env).stdout)["decisions"]
    return next(row for row in rows if row["kernel"] == "plugin.linear")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return super().run(problem, x, w, bias) * 1.01", "got"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process died of signal 11"),
        ("raise RuntimeError('no such symbol')", "no such symbol"),
    ],
    ids=["wrong", "crashes", "raises"],
)
def test_a_kernel_that_fails_is_refused_with_that_reason_from_then_on(plugin, body, why):
    plugin.write(body)
    assert explained(plugin)["accepted"]
    used = plugin.python("-c", USE, BLOCKSCALE_SELF_TEST="1")
    assert used.returncode == 0, used.stderr
    assert "plugin.linear" not in used.stdout
    row = explained(plugin)
    assert not row["accepted"]
    assert row["reasons"][0].startswith("the self-test on this device failed: ")
    assert why in row["reasons"][0]
    assert explained(plugin, BLOCKSCALE_SELF_TEST="0")["accepted"]
    plugin.write("return super().run(problem, x, w, bias)")  # another version of the package is tried anew
    info = plugin.folder / "plugin-1.0.dist-info" / "METADATA"
    info.write_text(info.read_text().replace("1.0", "1.1"))
    assert "plugin.linear" in plugin.python("-c", USE, BLOCKSCALE_SELF_TEST="1").stdout


def test_a_kernel_that_passes_is_used_and_not_tried_twice(plugin):
    plugin.write("open(os.environ['COUNT'], 'a').write('.')\nreturn super().run(problem, x, w, bias)")
    count = plugin.folder / "count"
    assert "plugin.linear" in plugin.python("-c", USE, BLOCKSCALE_SELF_TEST="1", COUNT=str(count)).stdout
    tried = len(count.read_text())
    assert tried > 6
    plugin.python("-c", USE, BLOCKSCALE_SELF_TEST="1", COUNT=str(count))
    assert len(count.read_text()) == tried + 1
    (file,) = (plugin.folder / "cache" / "self-test").glob("*.json")
    assert json.loads(file.read_text())["linear.plugin.linear.fp8_128x128"] == "passed"
    assert list(file.parent.glob(".*")) == []


class Wrong(Linear):
    name, priority = "wrong.linear", 10_000

    def run(self, problem, x, w, bias):
        return super().run(problem, x, w, bias) + 1


class Greedy(Wrong):
    name = "greedy.linear"

    def run(self, problem, x, w, bias):
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError("80 GiB wanted")
        return Linear.run(self, problem, x, w, bias)


@pytest.fixture
def trying(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKSCALE_CACHE", str(tmp_path))
    selftest._undecided.clear()
    selftest.enable()
    yield
    selftest.disable()


@pytest.fixture
def registered():
    added = []
    yield lambda kernel: added.append(blockscale.register(kernel))
    for kernel in added:
        blockscale.unregister(kernel)


def test_a_registered_kernel_is_tried_in_this_process(trying, registered):
    registered(Wrong())
    w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128", kernel="reference")
    x = torch.randn(2, 128)
    assert torch.equal(
        blockscale.linear(x, w), blockscale.linear(x, w, kernel=blockscale.nn.Linear(w).plan(x.dtype).pick(2).name)
    )
    with pytest.raises(NoKernelError, match="the self-test on this device failed: linear fp8_128x128"):
        blockscale.linear(x, w, kernel="wrong.linear")


def test_too_little_memory_is_no_verdict(trying, registered):
    registered(Greedy())
    w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128", kernel="reference")
    assert blockscale.nn.Linear(w).plan(torch.float32).pick(1).name == "greedy.linear"
    assert "greedy" not in json.dumps(verdicts.read(identity(detect("cpu"))))


def test_verdicts_are_part_of_the_platform_so_any_choice_can_be_computed():
    problem = registry.Problem("linear", 512, 512, torch.bfloat16, blockscale.get_format("fp8_128x128"))
    platform = Platform.parse("cuda:sm_90+triton=3.6+self-test.linear.gluon.decode.fp8_128x128=failed: NaN")
    rows = {d.kernel.name: d for d in registry.explain(problem, platform)}
    assert rows["gluon.decode"].reasons == ("the self-test on this device failed: NaN",)
    assert rows["gluon.prefill"].accepted
    assert Platform.parse(str(platform)) == platform


def test_a_damaged_file_is_no_verdict(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKSCALE_CACHE", str(tmp_path))
    verdicts.record("k", "a", "passed")
    verdicts.record("k", "b", "failed: x")
    assert verdicts.failures("k") == [("self-test.b", "failed: x")]
    file = tmp_path / "self-test" / "k.json"
    for text in ("{", "[1]", ""):
        file.write_text(text)
        assert verdicts.read("k") == {}
    monkeypatch.setenv("BLOCKSCALE_SELF_TEST", "0")
    verdicts.record("k", "b", "failed: x")
    assert verdicts.failures("k") == []
