"""What a warm call keeps, and who shares it: streams, threads, graphs. The launches themselves are stand-ins."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from blockscale import formats, registry
from blockscale.kernels.gluon import eager, launch
from blockscale.tensor import BlockScaled

PROBLEM = registry.Problem("linear", 192, 256, torch.bfloat16, formats.get_format("fp8_128x128"))


class Prepared:
    """Stands in for `eager.Prepared`: takes scratch memory like it and says which it is."""

    def __init__(self, problem, x, w, bias, stream):
        self.problem, self.rows, self.stream = problem, tuple(x.shape), stream
        self.kept = eager._scratch(x.device, stream, x.shape[0] * 1000)

    def __call__(self, x, address, bias):
        assert address == x.data_ptr()
        return self


@pytest.fixture
def card(monkeypatch):
    """A card with a current stream: change `stream`, `external` and `captures`."""
    card = SimpleNamespace(stream=7, external=False, captures=False)
    monkeypatch.setattr(eager, "_device", lambda: -1)
    monkeypatch.setattr(eager, "_stream", lambda device: card.stream)
    monkeypatch.setattr(eager, "_captures", lambda: card.captures)
    monkeypatch.setattr(eager, "is_external", lambda device: card.external)
    monkeypatch.setattr(eager, "Prepared", Prepared)
    monkeypatch.setattr(eager, "_kept", eager._Kept())
    monkeypatch.setattr(eager.Linear, "_through_triton", lambda *args: "through triton")
    monkeypatch.setattr(eager.Linear, "_elsewhere", lambda *args: "elsewhere")
    return card


@pytest.fixture
def w():
    scale = torch.ones(2, 2)
    return BlockScaled(torch.zeros(192, 256).to(torch.float8_e4m3fn), scale, PROBLEM.format)


def call(w, x, bias=None):
    return eager.Linear(PROBLEM)(x, w.data, w.scale, None, None, bias, x.numel() // 256)


def test_a_call_is_prepared_once_for_each_stream_and_number_of_rows(card, w):
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    first = call(w, x)
    assert call(w, x.clone()) is first
    assert call(w, x.view(1, 3, 256)) is first
    assert call(w, torch.zeros(5, 256, dtype=torch.bfloat16)) is not first
    assert call(w, torch.zeros(3, 512, dtype=torch.bfloat16)[:, :256]) is not first  # rows further apart
    with_bias = {call(w, x, torch.zeros(192, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)}
    assert len(with_bias | {first}) == 3  # a kernel is compiled for the dtype of its bias
    at_the_same_address = BlockScaled.trusted(w.data, w.scale.view(torch.int32), w.format, "row", w.shape)
    assert call(at_the_same_address, x) == "through triton"  # what lies there now is read by its own dtype
    card.stream = 8
    other = call(w, x)
    assert other is not first
    assert other.kept.data_ptr() != first.kept.data_ptr()
    card.stream = 7
    assert call(w, x) is first


def test_streams_of_another_library_share_nothing(card, w):
    """Their handles may come round again while kernels of the destroyed stream still run."""
    card.external = True
    assert call(w, torch.zeros(3, 256, dtype=torch.bfloat16)) == "through triton"
    assert (eager._kept.prepared, eager._kept.scratch) == ({}, {})


def test_captured_strided_and_far_calls_go_their_own_way(card, w, monkeypatch):
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    assert call(w, torch.zeros(256, 3, dtype=torch.bfloat16).T) == "elsewhere"
    card.captures = True
    assert call(w, x) == "elsewhere"
    card.captures = False
    monkeypatch.setattr(eager, "_device", lambda: 1)
    assert call(w, x) == "elsewhere"
    assert eager._kept.prepared == {}


def test_threads_share_nothing_and_leave_nothing_behind(card, w):
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    mine, left = call(w, x), []

    def work():
        theirs = call(w, x)
        assert theirs is not mine
        assert theirs.kept.data_ptr() != mine.kept.data_ptr()
        left.append(weakref.ref(theirs.kept))

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    gc.collect()
    assert len(left) == 3
    assert [memory() for memory in left] == [None] * 3
    assert call(w, x) is mine


def test_scratch_memory_grows_and_what_uses_the_old_goes_on(card):
    device = torch.device("cpu")
    small = eager._scratch(device, 7, 100)
    assert eager._scratch(device, 7, small.numel()) is small
    large = eager._scratch(device, 7, small.numel() + 1)
    assert large.numel() == 2 * small.numel()
    assert eager._scratch(device, 7, 100) is large
    assert eager._scratch(device, 7, eager._KEPT_SCRATCH).numel() == eager._KEPT_SCRATCH
    assert eager._scratch(device, 7, eager._KEPT_SCRATCH + 1) is None


@pytest.mark.parametrize(
    ("handle", "number", "external"),
    [(0, 0, False), (0x1FA35C60, 3, False), (0x17EDDC20, 0x17EDDC20, True)],
    ids=["default", "torch's", "another's"],
)
def test_whose_stream_it_is(monkeypatch, handle, number, external):
    """The numbers as torch 2.11 gives them on an H100."""
    current = SimpleNamespace(cuda_stream=handle, stream_id=number)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    assert launch.is_external(torch.device("cuda", 0)) is external


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [16, 13])
def test_the_result_has_the_dtype_that_the_kernel_writes(out, n):
    """Partial sums of bf16 x are fp32: a result in x's dtype would be half as long as what is written."""
    call = object.__new__(eager.Prepared)
    call.out_dtype, call.m, call.n, call.y_cols = out, 3, n, 16
    call.kept, call.y_map = object(), None
    call.x_address, call.y_address = SimpleNamespace(value=0), SimpleNamespace(value=0)
    call.quantize = call.multiply = SimpleNamespace(enqueue=lambda: 0)
    x = torch.zeros(3, 128, dtype=torch.bfloat16)
    y = call(x, x.data_ptr(), None)
    assert (y.dtype, tuple(y.shape)) == (out, (3, n))
    assert call.y_address.value
    assert call.x_address.value == x.data_ptr()
