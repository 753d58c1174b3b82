"""Launches through the CUDA driver with parameters that lie ready in memory.

Triton's own launcher takes 20 to 50 us for kernels with several TMA descriptors: it binds and specialises the
arguments and encodes the descriptors anew at each call. Here all that is done once; a call changes a few addresses and
enters `cuLaunchKernelEx`. The driver copies parameters when it is called, so they may change right after.

How Triton passes parameters, in 3.6 and 3.7: the signature's order, without constexprs; a descriptor as its 128-byte
tensor map, then its shape as int32 and its strides as int64; two scratch pointers at the end.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from typing import Any

from torch import Tensor

from ...errors import BlockscaleError
from .launch import Launch

_SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_L2_PROMOTION_128B = 2
_HOST_DTYPES = {8: 10, 9: 8, 10: 9}  # the device counts the float types of a tensor map in another order


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint64 * 8))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint32),
    )


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise BlockscaleError(f"{what}: CUDA error {result}, {(text.value or b'unknown').decode()}")


class TensorMap:
    """A TMA descriptor of one operand, whose address can be changed."""

    def __init__(self, descriptor: Any, meta: dict[str, Any]) -> None:
        self._memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.at = ctypes.c_void_p(start + -start % _MAP_ALIGNMENT)
        self._base = descriptor.base.data_ptr()
        rank, size = len(descriptor.shape), meta["elem_size"]
        strides = [s * size for s in reversed(descriptor.strides[:-1])]
        dtype = _HOST_DTYPES.get(meta["elem_type"], meta["elem_type"])
        result = _driver().cuTensorMapEncodeTiled(
            self.at,
            dtype,
            rank,
            ctypes.c_void_p(self._base),
            (ctypes.c_uint64 * rank)(*reversed(descriptor.shape)),
            (ctypes.c_uint64 * rank)(*strides),
            (ctypes.c_uint32 * rank)(*reversed(meta["block_size"])),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,
            meta["swizzle"],
            _L2_PROMOTION_128B,
            0,
        )
        _check(result, "cuTensorMapEncodeTiled")
        self._replace = _driver().cuTensorMapReplaceAddress

    def point_to(self, address: int) -> None:
        """address: of the first element, a multiple of 16 bytes."""
        if address != self._base:
            _check(self._replace(self.at, ctypes.c_void_p(address)), "cuTensorMapReplaceAddress")
            self._base = address


class Direct:
    """One kernel with all its parameters. `pointers` and `maps` hold what a caller may change between launches."""

    def __init__(self, launch: Launch, compiled: Any, stream: int) -> None:
        """compiled: what the first call of `launch.kernel` returned. stream: the CUstream's address."""
        values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
        metas = iter(compiled.metadata.tensordesc_meta)
        self.pointers: dict[str, ctypes.c_uint64] = {}
        self.maps: dict[str, TensorMap] = {}
        self._keep: list[Any] = []
        addresses: list[int] = []

        def add(storage: Any) -> Any:
            self._keep.append(storage)
            addresses.append(ctypes.addressof(storage))
            return storage

        for name, kind in compiled.src.signature.items():
            if kind == "constexpr":
                continue
            value = values[name]
            if kind.startswith("tensordesc"):
                self.maps[name] = tensor_map = TensorMap(value, next(metas))
                addresses.append(tensor_map.at.value or 0)
                for extent in value.shape:
                    add(ctypes.c_int32(extent))
                for stride in value.strides:
                    add(ctypes.c_int64(stride))
            elif isinstance(value, Tensor):
                self.pointers[name] = add(ctypes.c_uint64(value.data_ptr()))
            else:
                add(_SCALARS[kind](value))
        add(ctypes.c_uint64(0))
        add(ctypes.c_uint64(0))
        self._parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        warps, ctas, shared = compiled.packed_metadata[:3]
        assert ctas == 1, "clusters are not launched this way"
        self._attributes = (_Attribute * 1)(_Attribute(_SERIALIZATION, 0, (1,)))
        grid = (*launch.grid, 1, 1)[:3]
        overlap = 1 if launch.options.get("launch_pdl") else 0
        self._config = _Config(grid, (32 * warps, 1, 1), shared, stream, self._attributes, overlap)
        function = ctypes.c_void_p(compiled.function)
        self.enqueue = partial(_driver().cuLaunchKernelEx, ctypes.byref(self._config), function, self._parameters, None)
        """Starts the kernel: the driver's error code, 0 for none."""


def check_launch(result: int) -> None:
    """Raise for the error code of a launch."""
    _check(result, "cuLaunchKernelEx")
