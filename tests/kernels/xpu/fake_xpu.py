"""Fake tensors on "xpu" in a torch that was built without it.

FakeTensorMode itself is enough for most operations. A few enter C++ that asks for the device's guard first, which such
a torch lacks; these are said here in operations that do not.
"""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def indexed(x, index):
    """x[index] by slice, select, unsqueeze and index."""
    index = index if isinstance(index, tuple) else (index,)
    used = sum(1 for i in index if i is not None and i is not Ellipsis)
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
            tensors += [None] * (dim - len(tensors)) + [torch.as_tensor(i)]
            dim += 1
    return aten.index(x, tensors) if tensors else x


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


REWRITTEN = {torch.Tensor.__getitem__: indexed, torch.Tensor.to: moved}
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
