import itertools
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import blockscale
from blockscale import BlockscaleError, NoKernelError, Platform, UnknownNameError, platform, registry
from blockscale.cli import app
from blockscale.registry import Plan, Problem, Span, explain, kernels, select

CPU = Platform.parse("cpu:avx2")


def problem(**changes):
    base = {
        "op": "linear",
        "n": 512,
        "k": 1024,
        "x_dtype": torch.bfloat16,
        "format": blockscale.get_format("fp8_128x128"),
    }
    return Problem(**{**base, **changes})


class Fake:
    """A kernel made of data."""

    def __init__(self, name, priority, *, m_range=(1, None), layout="row", reasons=(), op="linear"):
        self.name, self.op, self.layout, self.priority, self.m_range = name, op, layout, priority, m_range
        self.reasons = reasons

    def why_not(self, problem, platform):
        yield from self.reasons

    def run(self, problem, x, w, bias):
        return x.new_zeros(x.shape[0], problem.n)


@pytest.fixture
def register():
    added = []

    def add(*args, **kwargs):
        added.append(blockscale.register(Fake(*args, **kwargs)))
        return added[-1]

    yield add
    for kernel in added:
        blockscale.unregister(kernel)


def test_names_and_priorities_are_unique_for_each_op():
    by_op = {op: list(ks) for op, ks in itertools.groupby(kernels(), key=lambda k: k.op)}
    for op, ks in by_op.items():
        assert len({k.name for k in ks}) == len({k.priority for k in ks}) == len(ks), op
    assert set(by_op) == set(registry.OPS)


def test_no_kernel_has_a_method_that_its_op_does_not_have():
    """`bind` takes the parts of one weight: an op for stacks of experts that inherits it would compute nonsense."""
    assert {kernel.op for kernel in kernels() if hasattr(kernel, "bind")} == {"linear"}


def test_every_op_has_a_last_resort_everywhere():
    for kernel in kernels():
        if kernel.name.startswith("reference."):
            fmt = None if kernel.op == "dense_linear" else blockscale.get_format("fp8_128x128")
            assert list(kernel.why_not(problem(op=kernel.op, format=fmt), Platform.parse("npu:x"))) == []


def test_explain_keeps_every_reason_best_first(register):
    register("fake.a", 1000, reasons=("one", "two"))
    register("fake.b", 999)
    first, second, *_ = explain(problem(), CPU)
    assert (first.kernel.name, first.reasons, first.accepted) == ("fake.a", ("one", "two"), False)
    assert (second.kernel.name, second.reasons, second.accepted) == ("fake.b", (), True)


def test_a_plan_cuts_m_by_priority(register):
    decode = register("fake.decode", 1001, m_range=(1, 64))
    prefill = register("fake.prefill", 1000, m_range=(33, None))
    plan = select(problem(), CPU)
    assert plan == Plan("row", (Span(1, 64, decode), Span(65, None, prefill)))
    assert [plan.pick(m).name for m in (0, 1, 64, 65, 10**6)] == ["fake.decode"] * 3 + ["fake.prefill"] * 2


def test_the_best_kernel_fixes_the_layout_and_gaps_are_filled_by_those_that_read_it(register):
    register("fake.kn", 1000, m_range=(17, None), layout="kn")
    register("fake.row", 999, m_range=(1, 16))
    plan = select(problem(), CPU)
    assert plan.layout == "kn"
    assert str(plan) == "M 1..16: reference.linear, M 17..: fake.kn"


def test_a_packed_weight_is_not_repacked_behind_your_back(register):
    register("fake.kn", 1000, layout="kn")
    reasons = {d.kernel.name: d.reasons for d in explain(problem(), CPU, repack=False)}
    assert reasons["fake.kn"] == ("the weight is packed as 'row', it reads 'kn'",)


def test_an_order_is_obeyed_or_raises(register):
    register("fake.no", 1000, reasons=("K=1024 is too long",))
    assert select(problem(), CPU, kernel="reference.linear").pick(1).name == "reference.linear"
    assert select(problem(), CPU, kernel="reference").pick(1).name == "reference.linear"
    with pytest.raises(NoKernelError, match=r"(?s)ordered: fake.*fake.no: K=1024 is too long") as e:
        select(problem(), CPU, kernel="fake")
    assert "reference" not in str(e.value)
    with pytest.raises(UnknownNameError, match="'reference.linear'"):
        select(problem(), CPU, kernel="reference.liner")


def test_an_order_that_serves_only_some_m_raises(register):
    register("fake.decode", 1000, m_range=(1, 64))
    with pytest.raises(NoKernelError, match=r"serves only M 1\.\.64"):
        select(problem(), CPU, kernel="fake.decode")


def test_the_environment_orders_by_the_same_rule(register, monkeypatch):
    register("fake.a", 1000)
    monkeypatch.setenv("BLOCKSCALE_KERNEL", "matmul=reference,linear=reference.linear")
    assert select(problem(), CPU).pick(1).name == "reference.linear"
    assert select(problem(), CPU, kernel="fake.a").pick(1).name == "fake.a"
    monkeypatch.setenv("BLOCKSCALE_KERNEL", "linear=nothing")
    with pytest.raises(UnknownNameError):
        select(problem(), CPU)
    for bad in ("linear", "linear=", "gemm=a"):
        monkeypatch.setenv("BLOCKSCALE_KERNEL", bad)
        with pytest.raises(BlockscaleError):
            select(problem(), CPU)


def test_no_kernel_lists_every_refusal():
    with pytest.raises(NoKernelError, match="x is torch.int8, needs") as e:
        select(problem(x_dtype=torch.int8), CPU)
    for kernel in kernels():
        if kernel.op == "linear":
            assert kernel.name in str(e.value)


def test_bad_kernels_are_refused(register):
    register("fake.a", 1000)
    with pytest.raises(BlockscaleError, match="priority 1000 for linear is taken by fake.a"):
        register("fake.b", 1000)
    with pytest.raises(BlockscaleError, match=r"another linear kernel has this name"):
        register("fake.a", 1001)
    with pytest.raises(BlockscaleError, match="lacks name"):
        blockscale.register(object())
    with pytest.raises(UnknownNameError, match="unknown op"):
        register("fake.c", 1002, op="gemm")


def test_third_party_kernels_come_through_the_entry_point(monkeypatch):
    third = Fake("third.linear", 5000)
    entry = metadata.EntryPoint("third", "third_party:KERNELS", registry.ENTRY_POINTS)
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: [third])
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == registry.ENTRY_POINTS else [])
    assert select(problem(), CPU).pick(1) is third


def test_a_patched_platform_is_asked_anew(monkeypatch):
    """(tests/conftest.py) What an earlier test or module found is no answer of this one's machine."""
    monkeypatch.setattr(platform, "_cpu_arch", lambda: "elbrus")
    assert platform.detect("cpu").arch == "elbrus"


def test_packages_that_clash_stop_nobody_else(monkeypatch):
    """Two packages with one priority: the second is left out, and said to be."""
    packages = {"one": [Fake("one.linear", 5000)], "two": [Fake("two.linear", 5001), Fake("two.other", 5000)]}
    entries = [metadata.EntryPoint(name, f"{name}:KERNELS", registry.ENTRY_POINTS) for name in packages]
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: packages[self.name])
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries if group == registry.ENTRY_POINTS else [])
    names = [k.name for k in kernels()]
    assert "one.linear" in names
    assert not {"two.linear", "two.other"} & set(names)
    assert registry.broken == {
        "two:KERNELS": "BlockscaleError: kernel two.other: priority 5000 for linear is taken by one.linear"
    }
    assert "not loaded two:KERNELS" in CliRunner().invoke(app, ["explain", "--shape", "192,576"]).stdout


def test_a_registered_kernel_serves_the_next_call(register):
    w = blockscale.quantize(torch.randn(64, 128), "fp8_128x128")
    x = torch.randn(2, 128)
    assert blockscale.linear(x, w).any()
    register("fake.zero", 1000)
    assert not blockscale.linear(x, w).any()
    assert blockscale.linear(x, w, kernel="reference").any()
