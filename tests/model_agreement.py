"""Do two devices run the same model? Layers are compared on equal inputs, tokens by their lead.

**Layers.** Every linear of one model gets the inputs that it had in the other. Both results are held to the fp64
product of the quantized values: each element to conformance's bound, each row to `row_tolerance` of its norm.

**Tokens.** Rounding activations to E4M3, routing and an indexer's top-k are steps: a difference of 1e-7 in front of one
can be 6e-2 of an element, or another expert, behind it, so no bound on the logits follows from one on the layers by
analysis alone. It is measured: `lead_bound` moves every row of every linear by a random vector as long as the row
tolerance allows, many times over, and takes the most that the leading token lost to any other. Where the lead in the
fp64 model is larger than that, the tolerance cannot change the token, and both devices must give this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockscale import reference
from blockscale.conformance.tolerance import product_bound
from blockscale.nn import BlockDiagonalLinear, DenseLinear, Linear, StackedLinear, WeightModule
from blockscale.tensor import BlockScaled

FP32_TOLERANCE = 2.0**-20
"""Of a row's norm, for sums in fp32. One product after the other and random signs give sqrt(K / 6) 2^-24, which is
5.5e-7 for the longest sum of the tiny models (K = 512); 2^-20 is 9.5e-7."""

Arguments = tuple[Tensor, ...]

TERM_ROUNDINGS = 6
"""The most that `conformance.compare.roundings` counts for a term outside of its sum."""


def row_tolerance(kernel: Any) -> float:
    """Error of a row relative to its norm that a kernel may have: what it declares, as conformance reads it, but of
    the norm of the sums instead of Σ |x| |w|, which is 5 to 10 times more for random signs.

    2^-10 for Hopper's fp8 sums. Each product loses up to 2^-13 of the largest of its 32, which is about 8 times the
    mean square one: 8 * 2^-13 / sqrt(3) = 2^-10.8 of the row's norm when signs are random.
    """
    return max(FP32_TOLERANCE, float(getattr(kernel, "accumulation_error", 0.0)))


@dataclass(frozen=True)
class LayerCheck:
    """One linear on one input. of_bound: worst error of an element as a share of conformance's bound. row_error:
    worst error of a row relative to its norm. allowed: `row_tolerance` of the kernel that ran."""

    name: str
    kernel: str
    rows: int
    of_bound: float
    row_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.of_bound <= 1 and self.row_error <= self.allowed


def layer_inputs(model: nn.Module, ids: Tensor) -> dict[str, Arguments]:
    """What every linear gets when the model reads `ids: [B, T]`."""
    seen: dict[str, Arguments] = {}
    with _hooked(model, lambda name: lambda m, args, y: seen.update({name: args})), torch.inference_mode():
        model(ids)
    return seen


@torch.inference_mode()
def check_layers(model: nn.Module, truth: nn.Module, inputs: Mapping[str, Arguments]) -> list[LayerCheck]:
    """`model`'s linears, on its device, against fp64 products with the weights of `truth`, on the CPU."""
    checks = []
    for name, args in inputs.items():
        module = model.get_submodule(name)
        value, magnitude = product(truth.get_submodule(name), args)
        got = module(*(a.to(model.device) for a in args)).cpu().double().reshape(value.shape)
        kernel = serving(module, args)
        extra = float(getattr(kernel, "accumulation_error", 0.0))
        error = (got - value).abs()
        bound = product_bound(value, magnitude, args[0].shape[-1] + TERM_ROUNDINGS, args[0].dtype, extra)
        norm = value.norm(dim=-1)
        rows = (error.norm(dim=-1) / norm.clamp(min=1e-30))[norm > 0]
        worst = float((error / bound).nan_to_num(torch.inf).max()), float(rows.nan_to_num(torch.inf).max())
        checks.append(LayerCheck(name, kernel.name, rows.numel(), *worst, row_tolerance(kernel)))
    return checks


def serving(module: Any, args: Arguments) -> Any:
    """The kernel that computes a linear on these arguments."""
    x = args[0]
    return module.plan(x.dtype).pick(x.numel() // x.shape[-1])


def product(module: nn.Module, args: Arguments) -> tuple[Tensor, Tensor]:
    """By the definition, in fp64: the products and the sums of magnitudes, one row for each row of x."""
    x = args[0]
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(module, DenseLinear):
        return _product(flat, module.weight)
    assert isinstance(module, WeightModule)
    w = module.row_weight()
    if isinstance(module, Linear):
        return _quantized_product(flat, w, module)
    assert isinstance(module, StackedLinear)
    pairs = [(flat.new_zeros(len(flat), w.shape[-2], dtype=torch.float64)) for _ in range(2)]
    for expert, rows in enumerate(_rows_of_experts(module, len(flat), args)):
        if rows.numel():
            for whole, part in zip(pairs, _quantized_product(flat[rows], w[expert], module), strict=True):
                whole[rows] = part
    return pairs[0], pairs[1]


def _rows_of_experts(module: StackedLinear, count: int, args: Arguments) -> Iterator[Tensor]:
    if isinstance(module, BlockDiagonalLinear):
        groups = module.shape[0]
        yield from (torch.arange(g, count, groups) for g in range(groups))
        return
    start = 0
    for end in args[1].tolist():
        yield torch.arange(start, max(start, end))
        start = max(start, end)


def _quantized_product(x: Tensor, w: BlockScaled, module: WeightModule) -> tuple[Tensor, Tensor]:
    return _product(reference.activations(x, w, module.numerics), reference.dequantize(w))


def _product(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x, w = x.double(), w.double()
    return x @ w.mT, x.abs() @ w.abs().mT


# -- tokens ------------------------------------------------------------------------------------------------------


def tolerances(model: nn.Module, inputs: Mapping[str, Arguments]) -> dict[str, float]:
    """`row_tolerance` of each linear as it runs on these inputs."""
    return {name: row_tolerance(serving(model.get_submodule(name), args)) for name, args in inputs.items()}


def lead_bound(
    model: Any, sequences: Tensor, truth: Tensor, allowed: Mapping[str, float], *, draws: int = 32, seed: int = 0
) -> Tensor:
    """The most that the top token of `truth: [B, T, V]` loses to another one, `[B, T]`, when rows of linears move.

    sequences: ids `[B, S]`; their last T positions are looked at. allowed: the row tolerance of each linear.
    """
    g = torch.Generator().manual_seed(seed)
    leads = truth.max(-1, keepdim=True).values - truth
    top = truth.argmax(-1, keepdim=True)
    worst = torch.zeros(truth.shape[:-1], dtype=truth.dtype)

    def moved(name: str) -> Any:
        def hook(m: nn.Module, args: Arguments, y: Tensor) -> Tensor:
            noise = torch.randn(y.shape, generator=g)
            return y + noise * allowed[name] * y.square().mean(-1, keepdim=True).sqrt()

        return hook

    with _hooked(model, moved), torch.inference_mode():
        for _ in range(draws):
            logits = model(sequences).logits[:, -truth.shape[1] :].to(truth.dtype)
            lost = leads - (logits.gather(-1, top) - logits)
            worst = torch.maximum(worst, lost.max(-1).values)
    return worst


def step_logits(model: Any, sequences: Tensor, prompt: int) -> Tensor:
    """Logits of every step that generates `sequences: [B, S]` after a prompt, token by token: `[B, S - prompt, V]`.

    The tokens are given, so both devices walk the same way; the key-value cache is the model's.
    """
    ids = sequences.to(model.device)
    with torch.inference_mode():
        out = model(ids[:, :prompt], use_cache=True)
        steps = [out.logits[:, -1]]
        for i in range(prompt, ids.shape[1] - 1):
            out = model(ids[:, i : i + 1], use_cache=True, past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
    return torch.stack(steps, 1).cpu()


@dataclass(frozen=True)
class Agreement:
    """positions looked at; decided: where the lead exceeds the bound; same: equal tokens; beyond: different where it
    was decided, which the tolerance does not explain."""

    positions: int
    decided: int
    same: int
    beyond: int


def agreement(logits: Tensor, truth: Tensor, bound: Tensor) -> Agreement:
    """Top tokens of `logits` against those of `truth`, both `[B, T, V]`."""
    first, second = truth.topk(2).values.unbind(-1)
    decided, same = first - second > bound, logits.argmax(-1) == truth.argmax(-1)
    return Agreement(same.numel(), int(decided.sum()), int(same.sum()), int((decided & ~same).sum()))


@contextmanager
def _hooked(model: nn.Module, make: Any) -> Iterator[None]:
    """Forward hooks `make(name)` on every linear that may run on a kernel of ours."""
    handles = [
        module.register_forward_hook(make(name))
        for name, module in model.named_modules()
        if isinstance(module, (WeightModule, DenseLinear))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
