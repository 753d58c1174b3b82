"""The call of a linear layer, made cheap: what depends on the weight and on M is prepared once and then started.

A call allocates y, puts its address and that of x in place and starts two kernels. Quantized x, its scales and partial
tiles lie in scratch memory that a thread keeps for each stream, where launches run one after another; large ones are
allocated by each call. What a thread prepared goes when it ends, and so does its scratch memory.

Two kinds of calls go through Triton's launcher, with memory of their own. Captured ones: their replays may run beside
anything, and cost the host nothing anyway. Those on a stream that another library made (`torch.cuda.ExternalStream`):
when it is destroyed, the next one may have its handle while its kernels still run. torch never destroys its own.
"""

from __future__ import annotations

from functools import cache
from threading import local

import torch
from torch import Tensor

from ...formats import get_format
from ...platform import detect
from ...registry import Problem
from ...tensor import BlockScaled
from . import gemm, quantize
from .config import Config, ceil_div, floats
from .direct import Direct, check_launch
from .launch import is_external
from .selection import choose

_MOST_PREPARED = 1 << 13
_LEAST_SCRATCH, _KEPT_SCRATCH = 1 << 20, 1 << 24
"""Bytes of the smallest and of the largest scratch memory that a thread keeps for a stream."""
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
        self.m, self.n, self.y_cols = m, n, ceil_div(n, per_16_bytes) * per_16_bytes
        groups, ld = ceil_div(k, 128), ceil_div(m, 4) * 4
        self.scale_at = ceil_div(m * k, 128) * 128
        self.parts_at = self.scale_at + ceil_div(groups * ld * 4, 128) * 128
        self.splits = floats(config, m, n, k, sms)
        self.bytes = self.parts_at + 4 * self.splits
        self.device, self.out_dtype = x.device, problem.out_dtype
        self.kept = _scratch(x.device, stream, self.bytes)
        scratch = self._allocate() if self.kept is None else self.kept
        data = scratch[: m * k].view(torch.float8_e4m3fn).view(m, k)
        scale = scratch[self.scale_at : self.scale_at + groups * ld * 4].view(torch.float32).view(groups, ld)
        y = torch.empty(m, self.y_cols, device=x.device, dtype=problem.out_dtype)
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

    def __call__(self, x: Tensor, x_address: int, bias: Tensor | None) -> Tensor:
        """x: [..., K], its M rows one after another from `x_address`."""
        if self.out_dtype is not x.dtype:  # a partial sum over ranks is fp32
            y = x.new_empty((*x.shape[:-1], self.y_cols), dtype=self.out_dtype)
        elif x.dim() == 2:
            y = x.new_empty(self.m, self.y_cols)  # numbers, not a tuple: torch reads them in a third less time
        else:
            y = x.new_empty(*x.shape[:-1], self.y_cols)
        self.x_address.value = x_address
        if bias is not None:
            self.bias_address.value = bias.data_ptr()
        if self.y_address is not None:
            self.y_address.value = y.data_ptr()
        elif self.y_map is not None:
            self.y_map.point_to(y.data_ptr())
        if self.kept is None:
            scratch = self._allocate()  # named: it must outlive the launches
            self._use(scratch.data_ptr())
        if result := self.quantize.enqueue() or self.multiply.enqueue():
            check_launch(result)
        return y if self.y_cols == self.n else y[..., : self.n].contiguous()

    def _use(self, scratch: int) -> None:
        first, second = self.quantize, self.multiply
        first.pointers["data_ptr"].value = scratch
        first.pointers["scale_ptr"].value = scratch + self.scale_at
        second.maps["x_desc"].point_to(scratch)
        second.maps["xs_desc"].point_to(scratch + self.scale_at)
        if self.splits:
            second.pointers["workspace"].value = scratch + self.parts_at


class _Kept(local):
    """What a thread has prepared, and its scratch memory by device and stream: a launch is not safe to share, since
    two threads that change its addresses would meet in them."""

    def __init__(self) -> None:
        self.prepared: dict[tuple[object, ...], Prepared] = {}
        self.scratch: dict[tuple[torch.device, int], Tensor] = {}


_kept = _Kept()


def _scratch(device: torch.device, stream: int, size: int) -> Tensor | None:
    """Memory for launches on this stream, at least `size` bytes; None where that is too much to keep.

    It grows in powers of two: whatever holds a smaller piece goes on using that. Freed memory returns to the stream
    that it was allocated on, which is the only one that used it, so no launch in flight can lose it.
    """
    if size > _KEPT_SCRATCH:
        return None
    found = _kept.scratch.get((device, stream))
    if found is None or found.numel() < size:
        grown = max(_LEAST_SCRATCH, 1 << (size - 1).bit_length())
        found = _kept.scratch[device, stream] = torch.empty(grown, device=device, dtype=torch.uint8)
    return found


def _config(problem: Problem, x: Tensor) -> tuple[Config, int]:
    platform = detect(x.device)
    sms = int(platform.value("sms") or 132)
    return choose(x.shape[0], problem.n, problem.k, sms, platform.value("chip") or "", problem.out_dtype.itemsize), sms


_device = getattr(torch._C, "_cuda_getDevice", None)
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_captures = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)
# straight from torch's library: the functions of torch.cuda around them cost a microsecond a call


class Linear:
    """`quantize(x) @ w.T + bias` for one problem, as `shortcut.Call`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __call__(
        self, x: Tensor, data: Tensor, scale: Tensor, level: Tensor | None, static: Tensor | None, bias: Tensor | None,
        m: int,
    ) -> Tensor:  # fmt: skip
        """x: [..., K] with m rows on the weight's device -> [..., N]. level, static: the format has none."""
        assert _device is not None
        assert _stream is not None
        assert _captures is not None
        device = x.get_device()
        if x.is_contiguous():
            distance = self.problem.k
        elif x.dim() == 2 and x.stride(1) == 1:
            distance = x.stride(0)
        else:
            return self._elsewhere(x.contiguous(), data, scale, bias, m)
        if _device() != device or _captures():
            return self._elsewhere(x, data, scale, bias, m)
        # kernels are compiled for the dtypes of scales and bias, and for aligned or unaligned addresses; another tensor
        # may come to lie where a weight's were
        address, stream = x.data_ptr(), _stream(device)
        added = None if bias is None else (bias.dtype, bias.data_ptr() % 16)
        key = (data.data_ptr(), scale.data_ptr(), scale.dtype, m, distance, address % 16, added, stream)
        prepared = _kept.prepared.get(key)
        if prepared is None or prepared.problem is not self.problem:
            if scale.dtype not in _READ_AS_STORED or is_external(x.device):
                return self._through_triton(x, data, scale, bias, m)
            if len(_kept.prepared) >= _MOST_PREPARED:
                _kept.prepared.clear()
            rows = x if x.dim() == 2 else x.view(m, self.problem.k)
            prepared = Prepared(self.problem, rows, self._weight(data, scale), bias, stream)
            _kept.prepared[key] = prepared
        return prepared(x, address, bias)

    def _weight(self, data: Tensor, scale: Tensor) -> BlockScaled:
        assert self.problem.format is not None
        return BlockScaled.trusted(data, scale, self.problem.format, "row", (self.problem.n, self.problem.k))

    def _elsewhere(self, x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, m: int) -> Tensor:
        """Calls that cannot be started as they come: on another device than the current one, strided, or captured."""
        with torch.cuda.device(x.device):
            if torch.cuda.is_current_stream_capturing():
                return self._through_triton(x, data, scale, bias, m)
            return self(x, data, scale, None, None, bias, m)

    def _through_triton(self, x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, m: int) -> Tensor:
        problem = self.problem
        act = problem.activation_format
        assert act is not None
        rows = x if x.dim() == 2 else x.view(m, problem.k)
        config, sms = _config(problem, rows)
        q = quantize.quantize(rows, act, problem.numerics.act_floor)
        y = gemm.multiply(q, self._weight(data, scale), bias, problem.out_dtype, config, sms, early=True)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], problem.n)


@cache
def linear(problem: Problem) -> Linear:
    """The one `Linear` of a problem."""
    return Linear(problem)
