"""What a launch is made of: arguments, TMA descriptors and the tickets of split tiles.

Imports triton, so it is imported inside `run` only.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_GLUON = {
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}


def matrix(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Boxes of `rows` x `cols` elements of a row-major matrix whose rows start at multiples of 16 bytes."""
    return TensorDescriptor.from_tensor(t, [rows, cols], _matrix_layout(rows, cols, t.dtype))


def flat(t: Tensor, box_bytes: int = 128) -> TensorDescriptor:
    """Boxes of consecutive elements of a contiguous tensor of scales: fp32, or uint8 with E8M0 codes."""
    size = t.element_size()
    return TensorDescriptor.from_tensor(t.view(-1), [box_bytes // size], _flat_layout(size))


@cache
def _matrix_layout(rows: int, cols: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, cols], _GLUON[dtype])


@cache
def _flat_layout(element_bytes: int) -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * element_bytes, rank=1)


class Launch(NamedTuple):
    """One kernel launch as data: `run` starts it, tests compile it on a machine without a GPU."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def argument(self, name: str) -> Any:
        """The argument that the kernel calls `name`."""
        return self.arguments[self.kernel.arg_names.index(name)]

    def run(self) -> Any:
        """Start it through Triton, which compiles it first where it must; the compiled kernel."""
        return self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def partial_tiles(device: torch.device, floats: int) -> Tensor:
    """Memory for partial tiles: torch's allocator hands it out again in stream order."""
    return torch.empty(floats, device=device, dtype=torch.float32)


_STREAM_TICKETS = 1 << 14
_GRAPH_TICKETS = 1 << 20
_of_stream: dict[tuple[int, int], Tensor] = {}
_of_graphs: dict[int, tuple[Tensor, int]] = {}  # device -> (counters, how many are given away)


def is_external(device: torch.device) -> bool:
    """Whether the current stream is another library's: its handle may be a destroyed stream's, and another's soon.

    torch numbers its own streams, which live as long as the process; the number of any other is its handle.
    """
    stream = torch.cuda.current_stream(device)
    return stream.cuda_stream != 0 and stream.stream_id == stream.cuda_stream


def take_tickets(device: torch.device, count: int) -> Tensor:
    """`count` int32 counters that are zero when the kernel starts; the kernel leaves them at zero.

    Launches on one stream run one after another and share the stream's counters; on a stream that is not torch's,
    they are cleared for each launch. A captured launch may be replayed beside any other, so it gets counters of its own
    for good: from a stock made by the first eager call, or, when that is used up, cleared inside the graph. Nothing
    ever grows or moves under a captured address.
    """
    if device.type != "cuda":  # compiling on a machine without a GPU
        return torch.zeros(count, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return _graph_tickets(device, count)
    if is_external(device):
        return torch.zeros(count, device=device, dtype=torch.int32)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _of_stream:
        _of_stream[key] = torch.zeros(_STREAM_TICKETS, device=device, dtype=torch.int32)
        if device.index not in _of_graphs:
            _of_graphs[device.index] = (torch.zeros(_GRAPH_TICKETS, device=device, dtype=torch.int32), 0)
            torch.cuda.current_stream(device).synchronize()
    return _of_stream[key] if count <= _STREAM_TICKETS else torch.zeros(count, device=device, dtype=torch.int32)


def _graph_tickets(device: torch.device, count: int) -> Tensor:
    stock, used = _of_graphs.get(device.index, (None, 0))
    if stock is None or used + count > _GRAPH_TICKETS:
        return torch.zeros(count, device=device, dtype=torch.int32)
    _of_graphs[device.index] = (stock, used + -(-count // 32) * 32)
    return stock[used : used + count]


def release_graph_tickets() -> None:
    """Take back the counters of all captured graphs. Only when none of them will be replayed again."""
    for device, (stock, _) in _of_graphs.items():
        _of_graphs[device] = (stock, 0)
