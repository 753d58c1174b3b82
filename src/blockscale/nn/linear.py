"""Linear layers on stored bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import checks, gradients, registry, shortcut
from ..errors import DtypeError, ShapeError
from ..formats import Format, get_format
from ..layouts import convert, get_layout
from ..numerics import Numerics, get_numerics
from ..ops import linear, linear_problem
from ..platform import Platform
from ..registry import Plan
from ..tensor import BlockScaled


@dataclass(frozen=True)
class Names:
    """Buffer names of the parts of a weight. A checkpoint brings its own."""

    data: str = "weight"
    scale: str = "scale"
    global_scale: str = "global_scale"
    input_scale: str = "input_scale"


class StoredModule(nn.Module):
    """A module with buffers that are stored bytes: moved between devices, never cast."""

    stored: tuple[str, ...] = ()
    """Names of those buffers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredModule:
        held = {name: self._buffers.pop(name) for name in self.stored}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in held.items():
            self._buffers[name] = None if buffer is None else _move_bytes(fn, buffer)
        return self


def _move_bytes(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Apply a module-wide function to the bytes of `t`: `.to(dtype)` and friends leave integers alone."""
    return fn(t.reshape(-1).view(torch.uint8)).view(t.dtype).reshape(t.shape)


class WeightModule(StoredModule):
    """A module around one stored weight. What `Linear` and `StackedLinear` have in common.

    Raises ShapeError for a weight of other dimensions, UnknownNameError for unknown numerics.
    """

    op = "linear"
    dims = 2

    def __init__(
        self,
        weight: BlockScaled,
        *,
        numerics: str | Numerics = "checkpoint",
        kernel: str | None = None,
        names: Names = Names(),
    ) -> None:
        super().__init__()
        if len(weight.shape) != self.dims:
            need = "[N, K]" if self.dims == 2 else "[E, N, K]"
            raise ShapeError(f"{type(self).__name__}: needs a weight {need}, got {list(weight.shape)}")
        self.shape = weight.shape
        self.out_features, self.in_features = weight.shape[-2:]
        self.numerics = get_numerics(numerics)
        self.kernel = kernel
        self.names = names
        self.stored = astuple(names)
        self._hold(weight)

    @property
    def quantized(self) -> BlockScaled:
        """The weight as it sits in memory now."""
        data, scale, level, static = (self._buffers[name] for name in self.stored)
        assert data is not None
        assert scale is not None
        return BlockScaled.trusted(data, scale, self.format, self.layout, self.shape, level, static)

    def plan(
        self, x_dtype: torch.dtype = torch.bfloat16, platform: Platform | None = None, *, repack: bool = False
    ) -> Plan:
        """Which kernels serve this layer, by M."""
        weight = self.quantized
        problem = linear_problem(weight, x_dtype, self.numerics, self.op)
        if platform:
            return registry.select(problem, platform, kernel=self.kernel, repack=repack)
        return registry.plan_for(problem, weight.device, kernel=self.kernel, repack=repack)

    def pack(self, x_dtype: torch.dtype = torch.bfloat16) -> Self:
        """Once, after loading: put the weight into the layout of the best kernel for its device."""
        self._hold(convert(self.quantized, self.plan(x_dtype, repack=True).layout))
        return self

    def row_weight(self) -> BlockScaled:
        """The weight in the layout "row", byte for byte as it was stored.

        Raises DtypeError when it was packed into a lossy layout.
        """
        if self.layout != "row" and not get_layout(self.layout).lossless:
            raise DtypeError(f"layout {self.layout!r} is lossy, so the stored bytes cannot be saved from it")
        return convert(self.quantized, "row")

    def set_weight(self, weight: BlockScaled, names: Names | None = None) -> None:
        """Replace the weight by another of the same shape, under other buffer names if they are given."""
        if weight.shape != self.shape:
            raise ShapeError(f"{type(self).__name__}: needs a weight {list(self.shape)}, got {list(weight.shape)}")
        for name in self.stored:
            del self._buffers[name]
        self.names = names or self.names
        self.stored = astuple(self.names)
        self._hold(weight)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, format={self.format}, layout={self.layout}, numerics={self.numerics}"

    def _hold(self, weight: BlockScaled) -> None:
        self.format, self.layout, self._policy = weight.format, weight.layout, str(self.numerics)
        self._bound = None
        for name, part in zip(
            self.stored, (weight.data, weight.scale, weight.global_scale, weight.input_scale), strict=True
        ):
            self.register_buffer(name, part)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout == "row":
            return
        if not get_layout(self.layout).lossless:
            raise DtypeError(f"{prefix}: layout {self.layout!r} is lossy, so the stored bytes cannot be saved from it")
        weight = convert(self.quantized, "row")
        destination[prefix + self.names.data], destination[prefix + self.names.scale] = weight.data, weight.scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._hold(convert(self.quantized, "row"))
        given = dict(state_dict)
        for name in self.stored:
            new, held = given.get(prefix + name), self._buffers[name]
            if new is not None and held is not None and new.dtype != held.dtype:  # torch would convert the numbers
                args[-1].append(f"{prefix}{name}: needs {held.dtype} as it is stored here, got {new.dtype}")
                given[prefix + name] = held
        super()._load_from_state_dict(given, prefix, *args)


class Linear(WeightModule):
    """`y = x @ dequantized(weight).T + bias`, computed on the stored bytes.

    weight: `[N, K]`, any format. bias: `[N]` or None. numerics: see `Numerics`. kernel: order one, or None.
    names: buffer names, so that the state_dict is the checkpoint's.

    forward: `x: [..., K]` (fp32, bf16, fp16) -> `[..., N]` in x's dtype.

    Raises ShapeError when weight and bias do not fit; forward, what `linear` raises.
    """

    def __init__(
        self,
        weight: BlockScaled,
        bias: Tensor | None = None,
        *,
        numerics: str | Numerics = "checkpoint",
        kernel: str | None = None,
        names: Names = Names(),
    ) -> None:
        super().__init__(weight, numerics=numerics, kernel=kernel, names=names)
        if bias is not None and tuple(bias.shape) != weight.shape[:1]:
            raise ShapeError(
                f"Linear: weight {list(weight.shape)} needs bias [{weight.shape[0]}], got {list(bias.shape)}"
            )
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def empty(
        cls,
        n: int,
        k: int,
        format: str | Format,
        *,
        scale_dtype: torch.dtype | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Linear:
        """An uninitialised `[n, k]` module for a loader to fill; options are the constructor's."""
        fmt = get_format(format)
        data = torch.empty(fmt.data_shape(n, k), dtype=fmt.element.dtype, device=device)
        scale = torch.empty(fmt.scale_shape(n, k), dtype=scale_dtype or fmt.scale_dtype, device=device)
        level = torch.empty((), device=device) if fmt.two_level else None
        return cls(
            BlockScaled(data, scale, fmt, shape=(n, k), global_scale=level),
            torch.empty(n, device=device) if bias else None,
            **options,
        )

    def forward(self, x: Tensor) -> Tensor:
        buffers, names, bias = self._buffers, self.names, self.bias
        data, scale = buffers[names.data], buffers[names.scale]
        level, static = buffers[names.global_scale], buffers[names.input_scale]
        assert data is not None
        assert scale is not None
        y = shortcut.again(self._bound, x, data, scale, level, static, bias, self._policy, self.kernel)
        if y is not None:
            return y
        if shortcut.plain(x, data, bias):
            weight = self.quantized
            y = linear(x, weight, bias, numerics=self._policy, kernel=self.kernel)
            self._bound = weight.bound
            return y
        checks.operands("linear", x, data, self.shape, bias)
        return gradients.linear(
            x, data, scale, level, static, bias, self.out_features, self.in_features, self.format.name, self.layout,
            self._policy, self.kernel or "",
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, layout={self.layout}, numerics={self.numerics}"
        )
