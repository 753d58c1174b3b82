"""Fake tensors on "xpu" in a torch that was built without it.

FakeTensorMode itself is enough for most operations. A few enter C++ that asks for the device's guard first, which such
a torch lacks; these are said here in operations that do not.
"""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def selected(x, index):
    """(the view of x that an index's slices, numbers and Nones give, its tensors by dimension)."""
    index = index if isinstance(index, tuple) else (index,)
    used = sum(i.dim() if isinstance(i, torch.Tensor) and i.dtype == torch.bool else 1
               for i in index if i is not None and i is not Ellipsis)  # fmt: skip
    full, dim, tensors = [], 0, []
    for i in index:
        full += [slice(None)] * (x.dim() - used) if i is Ellipsis else [i]
    for i in full:
        if i is None:
            x, dim = aten.unsqueeze(x, dim), dim + 1
        elif isinstance(i, slice):
            start, stop, step = i.indices(x.shape[dim])
            x, dim = aten.slice(x, dim, start, stop, step), dim + 1
        elif isinstance(i, int):
            x = aten.select(x, dim, i)
        else:
            i = torch.as_tensor(i)
            tensors += [None] * (dim - len(tensors)) + [i]
            dim += i.dim() if i.dtype == torch.bool else 1
    return x, tensors


def indexed(x, index):
    """x[index] by slice, select, unsqueeze and index."""
    x, tensors = selected(x, index)
    return aten.index(x, tensors) if tensors else x


def assigned(x, index, value):
    """x[index] = value."""
    x, tensors = selected(x, index)
    value = value if isinstance(value, torch.Tensor) else aten.full([], value, dtype=x.dtype, device=x.device)
    if tensors:
        aten.index_put_(x, tensors, value)
    else:
        aten.copy_(x, value)


def moved(x, *args, **kwargs):
    """x.to(…) as a copy."""
    kwargs = {k: v for k, v in kwargs.items() if k in ("device", "dtype") and v is not None}
    for a in args:
        if isinstance(a, torch.dtype):
            kwargs["dtype"] = a
        elif isinstance(a, str | torch.device):
            kwargs["device"] = a
        elif isinstance(a, torch.Tensor):
            kwargs.update(device=a.device, dtype=a.dtype)
    if "device" in kwargs:
        kwargs["device"] = torch.device(kwargs["device"])
    return aten._to_copy(x, **kwargs) if kwargs else x


REWRITTEN = {torch.Tensor.__getitem__: indexed, torch.Tensor.__setitem__: assigned, torch.Tensor.to: moved}
OPERATORS = {"__invert__": "bitwise_not", "__and__": "bitwise_and", "__or__": "bitwise_or", "__eq__": "eq"}


class Rewrite(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in REWRITTEN and isinstance(args[0], torch.Tensor):
            return REWRITTEN[func](*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as e:
            if "not linked with support for xpu" not in str(e):
                raise
            name = OPERATORS.get(func.__name__, func.__name__)
            return getattr(aten, name)(*args, **kwargs)


@contextmanager
def fake_xpu():
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, Rewrite():
        yield mode
