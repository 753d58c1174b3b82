"""What a model does while it generates: speed, memory, kernels, and where the time goes. Any transformers model."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import DenseLinear, StoredModule, WeightModule
from ...platform import detect
from .filling import runs_on


@dataclass(frozen=True)
class Timing:
    """One generation. Times in seconds; the first new token belongs to the prefill."""

    prompt_tokens: int
    tokens: tuple[int, ...]
    prefill_s: float
    decode_s: float

    @property
    def prefill_tokens_per_second(self) -> float | None:
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        steps = len(self.tokens) - 1
        return steps / self.decode_s if steps > 0 and self.decode_s > 0 else None


class _Clock:
    """A transformers streamer that notes when each token arrives."""

    def __init__(self, on_token: Callable[[int], None] | None) -> None:
        self.on_token, self.tokens, self.times = on_token, list[int](), list[float]()

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:  # the first call brings the prompt
            self.tokens.append(int(value.flatten()[0]))
            if self.on_token:
                self.on_token(self.tokens[-1])

    def end(self) -> None:
        """Part of the streamer interface; every token was already passed on."""


def generate(
    model: Any, ids: Tensor, new_tokens: int, *, stop: bool = True, on_token: Callable[[int], None] | None = None
) -> Timing:
    """Greedy generation from `ids: [1, prompt]`, timed.

    stop: end at the model's end-of-text token; False always makes `new_tokens` tokens. on_token: called with each.
    """
    clock = _Clock(on_token)
    lengths = {"max_new_tokens": new_tokens} if stop else {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    with torch.inference_mode():
        model.generate(
            ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device), do_sample=False,
            streamer=clock, **lengths,
        )  # fmt: skip
    start, first, *rest = clock.times
    return Timing(ids.shape[1], tuple(clock.tokens), first - start, (rest[-1] - first) if rest else 0.0)


@dataclass
class Split:
    """Seconds of one generation by who spent them."""

    ours: float = 0.0
    dense: float = 0.0
    total: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def rest(self) -> float:
        """Attention, norms, embeddings, sampling and Python: all that is neither quantized nor dense linears."""
        return max(0.0, self.total - self.ours - self.dense)

    def as_dict(self) -> dict[str, float]:
        """Shares of the total, 0 … 1."""
        total = self.total or 1.0
        return {"quantized_layers": self.ours / total, "dense_layers": self.dense / total, "rest": self.rest / total}


@contextmanager
def time_split(model: nn.Module) -> Iterator[Split]:
    """Within the context, count the time in block-scaled layers, in unquantized linears (lm_head), and the rest.

    Hooks cost about a microsecond a call; on an accelerator each layer is waited for, so the sum is an upper bound.
    """
    split, handles, started = Split(), [], dict[int, float]()
    device = next(model.parameters()).device

    def now() -> float:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
        return time.perf_counter()

    def before(module: nn.Module, args: object) -> None:
        started[id(module)] = now()

    def after(module: nn.Module, args: object, result: object) -> None:
        spent = now() - started.pop(id(module))
        who = "ours" if isinstance(module, StoredModule) else "dense"
        setattr(split, who, getattr(split, who) + spent)
        split.calls[who] += 1

    for module in model.modules():
        if isinstance(module, (StoredModule, nn.Linear)):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    begin = now()
    try:
        yield split
    finally:
        split.total = now() - begin
        for handle in handles:
            handle.remove()


def kernels_in_use(model: nn.Module, m: int = 1) -> dict[str, int]:
    """Kernel name -> number of layers that it serves at `m` rows of x, in the model's dtype."""
    dtype = getattr(model, "dtype", torch.bfloat16)
    names: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, (WeightModule, DenseLinear)):
            elsewhere = runs_on(module)
            plan = module.plan(dtype, None if elsewhere is None else detect(elsewhere))
            names[plan.pick(m).name] += 1
    return dict(names.most_common())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared storage counted once."""
    seen = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[tensor.device, tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def peak_memory(device: torch.device | str) -> int:
    """Peak bytes so far: of the allocator on an accelerator, of the whole process (resident set) on a CPU."""
    device = torch.device(device)
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    status = Path("/proc/self/status")  # getrusage's peak is inherited from the process that started this one
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
