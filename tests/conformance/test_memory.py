import ctypes

import pytest
import torch

import blockscale
from blockscale.conformance import memory


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3, 5), lambda: torch.empty_strided((3, 5), (1, 3)), lambda: torch.zeros(3, 5),
        lambda: torch.randn(3, 5).new_empty(2, 2), lambda: torch.empty_like(torch.ones(4, dtype=torch.bfloat16)),
        lambda: torch.full((3,), 2.0), lambda: torch.empty(7, dtype=torch.float8_e4m3fn),
    ],
    ids=["empty", "empty_strided", "zeros", "new_empty", "empty_like", "full", "fp8"],
)  # fmt: skip
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_byte_beside_any_allocation_is_noticed(allocate, side):
    with memory.Outputs() as guard:
        t = allocate()
    assert guard.damage() is None
    start = t.data_ptr() if side == "before" else t.data_ptr() + t.untyped_storage().nbytes() - 2 * memory.GUARD
    ctypes.memset(start - 9 if side == "before" else start + 8, 0, 1)
    text = guard.damage()
    assert "1 bytes written" in text
    assert side in text
    assert f"nearest {9 if side == 'before' else 8} away" in text


def test_what_is_not_written_is_nan_and_what_is_filled_keeps_its_values():
    with memory.Outputs():
        assert torch.empty(3, 5).isnan().all()
        assert torch.empty(3, dtype=torch.float8_e4m3fn).float().isnan().all()
        assert torch.zeros(3, 5).eq(0).all()
        assert torch.full((2, 2), 7, dtype=torch.int32).eq(7).all()
    assert torch.empty(0).numel() == 0


def test_strides_are_kept():
    with memory.Outputs():
        assert torch.empty_strided((3, 5), (1, 3)).stride() == (1, 3)
        assert torch.empty(2, 3).is_contiguous()


@pytest.mark.parametrize(("stride", "shift"), [(None, 0), ((8, 1), 0), ((1, 3), 0), (None, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_inputs_lie_as_asked_amid_nan(stride, shift, dtype):
    x = torch.randn(3, 4).to(dtype)
    inputs = memory.Inputs("cpu")
    put = inputs.put("x", x, stride, shift)
    assert put.dtype == dtype
    assert put.stride() == (stride or (4, 1))
    assert put.data_ptr() % memory.GUARD % 16 == (shift * x.element_size()) % 16 or shift == 0
    assert torch.equal(put.float(), x.float())
    around = torch.as_strided(put, (3,), (1,), put.storage_offset() - 3)
    assert (around.float().isnan() | torch.tensor(dtype == torch.int32)).all()
    assert inputs.change() is None
    put[0, 0] = 3 if put[0, 0] != 3 else 4
    name, byte, now, before = inputs.change()
    assert name == "x"
    assert 0 <= byte - shift * x.element_size() < x.element_size()
    assert now != before


def test_scaled_inputs():
    q = blockscale.quantize(torch.randn(4, 32), "nvfp4")
    inputs = memory.Inputs("cpu")
    put = inputs.put_scaled("w", q)
    assert torch.equal(blockscale.dequantize(put), blockscale.dequantize(q))
    put.global_scale.mul_(2)
    assert inputs.change()[0] == "w.global_scale"
    assert len(inputs.storages()) == 3
    assert len(inputs.storages(but="w.scale")) == 2
