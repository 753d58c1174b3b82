"""The native library: loaded lazily through ctypes, and its functions with torch tensors instead of pointers.

Built by setup.py from `native/` when a C++ compiler is there. Nothing here looks at hardware: the feature "cpu-native"
of the platform (see platform.py) says whether the library exists and which instruction set it shall use.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, addressof, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from ...errors import BlockscaleError
from ...formats import Format, ScaleRounding
from ...layouts import decode_scale
from ...platform import detect
from ...registry import Problem
from ...tensor import BlockScaled

PATH = Path(__file__).parent / "_native.so"
ABI = 2

TYPES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e8m0fnu: 3, torch.float8_e4m3fn: 4
}  # fmt: skip
ELEMENTS = {"fp8": 0, "fp8e5m2": 1, "fp4": 2}
_ROUNDINGS = {"none": 0, "pow2_ceil": 1, "pow2_floor": 2}
ENGINES = ("exact", "int16")

_CALL = Struct("q7P2i")
"""LinearCall of api.h. Packed bytes cost a third of what a ctypes structure does, and threads cannot share them."""


class _QuantizeRule(Structure):
    _fields_ = (
        ("rows", c_int64), ("group", c_int64), ("element", c_int32), ("rounding", c_int32),
        ("floor", c_float), ("enabled", c_int32),
    )  # fmt: skip


class _LinearSpec(Structure):
    _fields_ = (
        ("n", c_int64), ("k", c_int64), ("block_rows", c_int64), ("block_cols", c_int64),
        ("element", c_int32), ("x_type", c_int32), ("y_type", c_int32), ("engine", c_int32),
        ("activation", _QuantizeRule),
    )  # fmt: skip


@cache
def library() -> Any:
    """The loaded library, set to the platform's instruction set.

    Raises BlockscaleError when it is missing, of another version, or cannot use that instruction set.
    """
    if not PATH.exists():
        raise BlockscaleError(f"cpu.native: {PATH.name} is not built; install a C++ compiler and reinstall blockscale")
    lib = ctypes.CDLL(str(PATH))
    if lib.blockscale_abi() != ABI:
        raise BlockscaleError(
            f"cpu.native: {PATH.name} has ABI {lib.blockscale_abi()}, need {ABI}; reinstall blockscale"
        )
    lib.blockscale_isa.restype = ctypes.c_char_p
    wanted = detect("cpu").value("cpu-native") or lib.blockscale_isa().decode()
    if lib.blockscale_use(wanted.encode()) != 0:
        raise BlockscaleError(
            f"cpu.native: {PATH.name} has no kernels for {wanted!r} that this processor can run; BLOCKSCALE_CPU_ISA"
            f" needs {lib.blockscale_isa().decode()} here or one below, of avx512bf16, avx512, avx2, sse2 and neon"
        )
    spec, rule, p, i, l = POINTER(_LinearSpec), POINTER(_QuantizeRule), c_void_p, c_int32, c_int64  # noqa: E741
    for name, arguments in {
        "linear": [p, c_char_p],
        "grouped_linear": [spec, l, l, p, p, p, l, p, l, i, p, i, p, i, p],
        "quantize": [rule, l, l, p, i, p, p, p, i],
        "dense": [l, l, l, p, p, p, p, i, i, i, i],
    }.items():
        function = getattr(lib, f"blockscale_{name}")
        function.argtypes, function.restype = arguments, None
    return lib


def isa() -> str:
    """The instruction set whose kernels run: "avx512bf16", "avx512", "avx2", "sse2" or "neon"."""
    name: bytes = library().blockscale_isa()
    return name.decode()


def threads() -> int:
    """Threads that a large call would use: torch's number, or one in a forked child."""
    count: int = library().blockscale_threads()
    return count


def _rule(fmt: Format | None, rounding: ScaleRounding | None, floor: float) -> _QuantizeRule:
    if fmt is None:
        return _QuantizeRule(enabled=0)
    rows, group = fmt.block
    return _QuantizeRule(
        rows or 0, group or 0, ELEMENTS[fmt.element.name], _ROUNDINGS[rounding or fmt.scale_rounding], floor, 1
    )


class _Bound:
    """What a problem fixes, built once for each Problem object."""

    def __init__(self, problem: Problem, engine: str) -> None:
        fmt = problem.format
        assert fmt is not None
        self.problem = problem
        activation = problem.activation_format
        rows, cols = fmt.block
        self.spec = _LinearSpec(
            problem.n, problem.k, rows or 0, cols or 0, ELEMENTS[fmt.element.name],
            TYPES[problem.x_dtype], TYPES[problem.out_dtype], ENGINES.index(engine),
            _rule(activation, None, problem.numerics.act_floor),
        )  # fmt: skip
        self.reference, self.address = byref(self.spec), addressof(self.spec)
        self.static = activation is not None and activation.block == (None, None)
        self.n, self.out_dtype = problem.n, problem.out_dtype
        self.lib = library()
        self.linear = self.lib.blockscale_linear

    def __call__(
        self, x: Tensor, data: Tensor, scale: Tensor, level: Tensor | None, static: Tensor | None, bias: Tensor | None,
        m: int,
    ) -> Tensor:  # fmt: skip
        """`x: [..., K]` of M rows in all, the weight's data, scale, global_scale and input_scale -> `[..., N]`."""
        x, data, scale = x.contiguous(), data.contiguous(), scale.contiguous()
        if level is not None:
            level = level.float()
        if static is not None:
            static = static.float() if self.static else None
        if bias is not None:
            bias = bias.contiguous()
        if x.dim() == 2:
            y = torch.empty(m, self.n, dtype=self.out_dtype)
        else:
            y = torch.empty(*x.shape[:-1], self.n, dtype=self.out_dtype)
        self.linear(self.address, _CALL.pack(
            m, x.data_ptr(), data.data_ptr(), scale.data_ptr(),
            0 if level is None else level.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if static is None else static.data_ptr(),
            y.data_ptr(), TYPES[scale.dtype], 0 if bias is None else TYPES[bias.dtype],
        ))  # fmt: skip
        return y


_bound: dict[str, dict[int, _Bound]] = {engine: {} for engine in ENGINES}


def _bind(problem: Problem, engine: str = "exact") -> _Bound:
    """Memoised by identity: the registry hands out the same Problem every time, and hashing one costs microseconds."""
    held = _bound[engine]
    hit = held.get(id(problem))
    if hit is None or hit.problem is not problem:
        if len(held) > 4096:
            held.clear()
        hit = held[id(problem)] = _Bound(problem, engine)
    return hit


def linear(problem: Problem, x: Tensor, w: BlockScaled, bias: Tensor | None, engine: str = "exact") -> Tensor:
    """`x: [M, K]`, `w: [N, K]` in layout "row" -> `[M, N]` in the problem's out_dtype. engine: one of ENGINES."""
    return _bind(problem, engine)(x, w.data, w.scale, w.global_scale, w.input_scale, bias, x.shape[0])


def bind_linear(problem: Problem, engine: str = "exact") -> _Bound:
    """`linear` of one problem as a function of the parts alone: what an eager call is started with again and again."""
    return _bind(problem, engine)


def grouped_linear(problem: Problem, x: Tensor, w: BlockScaled, offsets: Tensor) -> Tensor:
    """`x: [T, K]` sorted by expert, `w: [E, N, K]`, offsets int `[E]` -> `[T, N]`; rows past the last are zero."""
    bound = _bind(problem)
    x, data, scale = x.contiguous(), w.data.contiguous(), w.scale.contiguous()
    ends = offsets.to(torch.int32).contiguous()
    y = torch.empty(x.shape[0], problem.n, dtype=problem.out_dtype)
    level, static = w.global_scale, w.input_scale if bound.static else None
    if level is not None:
        level = level.float().contiguous()
    if static is not None:
        static = static.float().contiguous()
    bound.lib.blockscale_grouped_linear(
        bound.reference, x.shape[0], ends.numel(), ends.data_ptr(), x.data_ptr(),
        data.data_ptr(), data.stride(0), scale.data_ptr(), scale.stride(0), TYPES[scale.dtype],
        None if level is None else level.data_ptr(), level is not None and level.numel() > 1,
        None if static is None else static.data_ptr(), static is not None and static.numel() > 1,
        y.data_ptr(),
    )  # fmt: skip
    return y


def quantize(problem: Problem, x: Tensor, scale: Tensor | None, floor: float) -> BlockScaled:
    """`x: [rows, cols]` -> the problem's FP8 format in layout "row", with the bytes of `reference.quantize`."""
    fmt = problem.format
    assert fmt is not None
    x = x.contiguous()
    rows, cols = x.shape
    rule = _rule(fmt, problem.scale_rounding, floor)
    data = torch.empty(rows, cols, dtype=fmt.element.dtype)
    if scale is None:
        given, made = None, torch.empty(fmt.scale_shape(rows, cols), dtype=fmt.scale_dtype)
    else:
        given, made = decode_scale(scale).contiguous(), scale
    library().blockscale_quantize(
        byref(rule), rows, cols, x.data_ptr(), TYPES[x.dtype], None if given is None else given.data_ptr(),
        data.data_ptr(), made.data_ptr(), TYPES[made.dtype],
    )  # fmt: skip
    return BlockScaled.trusted(data, made, fmt, "row", (rows, cols))


def dense_linear(problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x: [M, K]` with M <= 4, unquantized `weight: [N, K]` -> `[M, N]` in out_dtype; fp32 sums."""
    x, weight = x.contiguous(), weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    y = torch.empty(x.shape[0], problem.n, dtype=problem.out_dtype)
    library().blockscale_dense(
        x.shape[0], problem.n, problem.k, x.data_ptr(), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(),
        TYPES[x.dtype], TYPES[weight.dtype], 0 if bias is None else TYPES[bias.dtype], TYPES[y.dtype],
    )  # fmt: skip
    return y
