"""The call of a linear layer, made cheap: what depends on the weight and on M is prepared once and then started.

A call allocates y, puts its address and that of x in place and starts two kernels. Quantized x, its scales and partial
tiles lie in scratch memory that a thread keeps for each stream, where launches run one after another; large ones are
allocated by each call. A captured call goes through Triton's launcher, with memory and tickets of its own: its replays
may run beside anything, and cost the host nothing anyway.
"""

from __future__ import annotations

from functools import cache
from threading import get_ident

import torch
from torch import Tensor

from ...formats import get_format
from ...platform import detect
from ...registry import Problem
from ...tensor import BlockScaled
from . import gemm, quantize
from .config import Config, ceil_div, floats
from .direct import Direct, check_launch
from .selection import choose

_MOST_PREPARED = 1 << 13
_KEPT_SCRATCH = 1 << 24
"""Bytes of scratch memory that each pair of thread and stream keeps."""
_READ_AS_STORED = (torch.float32, torch.float8_e8m0fnu)  # weight scales that no conversion comes before


class Prepared:
    """Quantize x and multiply, for one weight, one M and one thread.

    It holds addresses of the weight but no reference: a weight that comes to lie at the same address later has the
    same descriptors.
    """

    def __init__(self, problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None, stream: int) -> None:
        act = problem.activation_format
        assert act is not None
        self.problem = problem
        m, n, k = x.shape[0], problem.n, problem.k
        config, sms = _config(problem, x)
        self.config = config
        per_16_bytes = 16 // problem.out_dtype.itemsize
        self.y_shape = (m, ceil_div(n, per_16_bytes) * per_16_bytes)
        groups, ld = ceil_div(k, 128), ceil_div(m, 4) * 4
        self.scale_at = ceil_div(m * k, 128) * 128
        self.parts_at = self.scale_at + ceil_div(groups * ld * 4, 128) * 128
        self.splits = floats(config, m, n, k, sms)
        self.bytes = self.parts_at + 4 * self.splits
        self.device = x.device
        self.kept = _scratch(x.device, stream, get_ident()) if self.bytes <= _KEPT_SCRATCH else None
        scratch = self._allocate() if self.kept is None else self.kept
        data = scratch[: m * k].view(torch.float8_e4m3fn).view(m, k)
        scale = scratch[self.scale_at : self.scale_at + groups * ld * 4].view(torch.float32).view(groups, ld)
        y = torch.empty(self.y_shape, device=x.device, dtype=problem.out_dtype)
        q = BlockScaled.trusted(data, scale, get_format("fp8_1x128"), "tma", (m, k))
        first = quantize.launch(x, data, scale, act.scale_rounding == "pow2_ceil", problem.numerics.act_floor)
        parts = scratch[self.parts_at : self.bytes].view(torch.float32) if self.splits else None
        second = gemm.launch(q, w, bias, y[:, :n], config, sms, parts, early=True)
        self.tickets = second.argument("tickets") if self.splits else None
        self.quantize = Direct(first, first.run(), stream)
        self.multiply = Direct(second, second.run(), stream)
        self.x_address = self.quantize.pointers["x_ptr"]
        self.bias_address = self.multiply.pointers["bias_ptr"]
        self.y_map = self.multiply.maps.get("y_desc")  # by TMA, or through a pointer
        self.y_address = self.multiply.pointers.get("y_ptr")

    def _allocate(self) -> Tensor:
        return torch.empty(self.bytes, device=self.device, dtype=torch.uint8)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = self.problem.out_dtype  # not always x's: a partial sum over ranks is fp32
        y = x.new_empty(self.y_shape) if out is x.dtype else x.new_empty(self.y_shape, dtype=out)
        self.x_address.value = x.data_ptr()
        if bias is not None:
            self.bias_address.value = bias.data_ptr()
        if self.y_map is not None:
            self.y_map.point_to(y.data_ptr())
        elif self.y_address is not None:
            self.y_address.value = y.data_ptr()
        if self.kept is None:
            scratch = self._allocate()  # named: it must outlive the launches
            self._use(scratch.data_ptr())
        if result := self.quantize.enqueue() or self.multiply.enqueue():
            check_launch(result)
        n = self.problem.n
        return y if self.y_shape[1] == n else y[:, :n].contiguous()

    def _use(self, scratch: int) -> None:
        first, second = self.quantize, self.multiply
        first.pointers["data_ptr"].value = scratch
        first.pointers["scale_ptr"].value = scratch + self.scale_at
        second.maps["x_desc"].point_to(scratch)
        second.maps["xs_desc"].point_to(scratch + self.scale_at)
        if self.splits:
            second.pointers["workspace"].value = scratch + self.parts_at


@cache
def _scratch(device: torch.device, stream: int, thread: int) -> Tensor:
    return torch.empty(_KEPT_SCRATCH, device=device, dtype=torch.uint8)


def _config(problem: Problem, x: Tensor) -> tuple[Config, int]:
    platform = detect(x.device)
    sms = int(platform.value("sms") or 132)
    return choose(x.shape[0], problem.n, problem.k, sms, platform.value("chip") or ""), sms


_prepared: dict[tuple[int, ...], Prepared] = {}


_device = getattr(torch._C, "_cuda_getDevice", None)
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_captures = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)
# straight from torch's library: the functions of torch.cuda around them cost a microsecond a call


def linear(problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
    """`quantize(x) @ w.T + bias`: [M, N]. x: [M, K] on the weight's device."""
    assert _device is not None
    assert _stream is not None
    assert _captures is not None
    device = x.get_device()
    rows, cols = x.stride()
    if _device() != device or cols != 1 or _captures():
        return _elsewhere(problem, x, w, bias)
    # kernels are compiled for aligned or unaligned addresses; what is prepared holds addresses, so it is a thread's own
    aligned = x.data_ptr() % 16 * 32 + (16 if bias is None else bias.data_ptr() % 16)
    stream = _stream(device)
    key = (w.data.data_ptr(), w.scale.data_ptr(), x.shape[0], rows, aligned, stream, get_ident())
    prepared = _prepared.get(key)
    if prepared is None or prepared.problem is not problem:
        if w.scale.dtype not in _READ_AS_STORED:
            return _through_triton(problem, x, w, bias)
        if len(_prepared) >= _MOST_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared = Prepared(problem, x, w, bias, stream)
    return prepared(x, bias)


def _elsewhere(problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
    """Calls that cannot be started as they come: on another device than the current one, strided, or captured."""
    if x.stride(1) != 1:
        x = x.contiguous()
    with torch.cuda.device(x.device):
        if torch.cuda.is_current_stream_capturing():
            return _through_triton(problem, x, w, bias)
        return linear(problem, x, w, bias)


def _through_triton(problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None) -> Tensor:
    act = problem.activation_format
    assert act is not None
    config, sms = _config(problem, x)
    q = quantize.quantize(x, act, problem.numerics.act_floor)
    return gemm.multiply(q, w, bias, problem.out_dtype, config, sms, early=True)
