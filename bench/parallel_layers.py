"""DeepSeek-V3-shaped layers, whole on one device and spread over ranks, for bench/parallel.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockscale import nn, ops
from blockscale.formats import get_format
from blockscale.parallel import (
    ColumnParallelLinear,
    Group,
    ParallelExperts,
    ParallelMLP,
    RowParallelLinear,
    World,
    piece,
    take,
)
from blockscale.parallel.cuts import cut, scaled, shares
from blockscale.tensor import BlockScaled

NUMERICS = "deepseek_v3"
EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of a model. DEEPSEEK is V3's; TINY only proves that the script runs."""

    hidden: int
    inner: int
    heads: int
    nope: int
    rope: int
    value: int
    q_rank: int
    kv_rank: int
    experts: int
    top_k: int
    expert_inner: int
    prefill: tuple[int, ...]
    decode: tuple[int, ...]


DEEPSEEK = Sizes(7168, 18432, 128, 128, 64, 128, 1536, 512, 256, 8, 2048, (4096, 8192), (1, 16, 64))
TINY = Sizes(256, 512, 4, 128, 64, 128, 256, 128, 8, 2, 128, (64,), (1, 4))


def random_weight(shape: tuple[int, ...], device: torch.device, seed: int, fmt: str = "fp8_128x128") -> BlockScaled:
    """Random E4M3 bytes without NaN, and scales that keep products near 1. The same on every rank."""
    g = torch.Generator(device).manual_seed(seed)
    *lead, n, k = shape
    data = torch.empty(shape, dtype=torch.uint8, device=device)
    for part in data.flatten(0, -2).split(1 << 16):  # a stack of experts would need its size again
        part.random_(0, 256, generator=g)
        part.bitwise_and_(0xBF)  # |x| < 2: 0x7F and 0xFF, the NaNs, are gone too
    made = get_format(fmt)
    scale = torch.rand(*lead, *made.scale_shape(n, k), device=device, generator=g) * (0.5 / k**0.5)
    return BlockScaled(data.view(torch.float8_e4m3fn), scale, made)


def tokens(rows: int, k: int, device: torch.device, seed: int = 0) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, k, device=device, generator=g).bfloat16()


class Attention:
    """The projections of V3's attention. What lies between them is not ours and not timed: `o` gets a given input."""

    def __init__(self, s: Sizes, device: torch.device, numerics: str) -> None:
        self.s, self.numerics = s, numerics
        qk = s.nope + s.rope
        self.weights = {
            "q_a": random_weight((s.q_rank, s.hidden), device, 1),
            "q_b": random_weight((s.heads * qk, s.q_rank), device, 2),
            "kv_a": random_weight((s.kv_rank + s.rope, s.hidden), device, 3),
            "kv_b": random_weight((s.heads * (s.nope + s.value), s.kv_rank), device, 4),
            "o": random_weight((s.hidden, s.heads * s.value), device, 5),
        }
        self.layers = {name: nn.Linear(w, numerics=numerics) for name, w in self.weights.items()}

    def whole(self, x: Tensor, inner: Tensor) -> Tensor:
        s, layer = self.s, self.layers
        layer["q_b"](layer["q_a"](x))
        layer["kv_b"](layer["kv_a"](x)[:, : s.kv_rank].contiguous())
        return layer["o"](inner)

    def spread(self, world: World, group: Group, *, tokens_split: bool) -> SpreadAttention:
        """tokens_split: every rank holds some tokens, latents are gathered; otherwise all hold all tokens."""
        return SpreadAttention(self, world.rank, world.size, group, tokens_split)


class SpreadAttention:
    """Heads over ranks; the small latent projections are whole everywhere."""

    def __init__(
        self,
        whole: Attention,
        rank: int,
        size: int,
        group: Group,
        split: bool,
    ) -> None:
        s, weights = whole.s, whole.weights
        self.s, self.latent = s, whole.layers
        heads = shares(s.heads, size)
        self.heads = heads[rank]

        def column(name: str, width: int) -> ColumnParallelLinear:
            rows = tuple((r,) for r in scaled(heads, width))
            w = weights[name]
            part = take(w, piece(w.shape[-2:], w.format, rows=rows[rank]))
            rows = rows if group.size > 1 else (rows[rank],)
            return ColumnParallelLinear(part, group=group, rows=rows, rows_of_x=split, numerics=whole.numerics)

        self.q_b, self.kv_b = (
            column("q_b", s.nope + s.rope),
            column("kv_b", s.nope + s.value),
        )
        w, cols = weights["o"], scaled(heads, s.value)
        part = piece(w.shape[-2:], w.format, cols=cols, rank=rank, group=128)
        self.o = RowParallelLinear(
            take(w, part),
            group=group,
            part=part,
            scatter=split,
            met=split,
            numerics=whole.numerics,
        )

    def __call__(self, x: Tensor, inner: Tensor) -> Tensor:
        """x: this rank's tokens, or all. inner: `[T, heads here * value]`."""
        q = self.latent["q_a"](x)
        kv = self.latent["kv_a"](x)[:, : self.s.kv_rank].contiguous()
        if self.q_b.rows_of_x:  # both latents travel together
            parts = [self.q_b.rows_to_send(q), self.kv_b.rows_to_send(kv)]
            rows = self.q_b.group.start_gather(parts[0] + parts[1]).whole()
            self.q_b.multiply_sent(rows[: len(parts[0])], x.dtype)
            self.kv_b.multiply_sent(rows[len(parts[0]) :], x.dtype)
        else:
            self.q_b(q)
            self.kv_b(kv)
        y: Tensor = self.o(inner)
        return y


class Mlp:
    """V3's dense MLP, gate and up in one matrix."""

    def __init__(self, s: Sizes, device: torch.device, numerics: str) -> None:
        self.s, self.numerics = s, numerics
        self.gate_up = random_weight((2 * s.inner, s.hidden), device, 6)
        self.down = random_weight((s.hidden, s.inner), device, 7)
        self.first, self.second = (nn.Linear(w, numerics=numerics) for w in (self.gate_up, self.down))
        act = self.second.numerics.activation_format(self.down.format)
        assert act is not None
        self.act = act
        self.norm = torch.linspace(0.5, 1.5, s.hidden, device=device).bfloat16()

    def whole(self, x: Tensor) -> Tensor:
        return self._second(self.first(x))

    def normed(self, x: Tensor) -> Tensor:
        """The same behind an RMSNorm that is fused with the quantization."""
        q = ops.rmsnorm_quantize(x, self.norm, EPS, "fp8_1x128", floor=self.first.numerics.act_floor)
        return self._second(ops.matmul(q, self.gate_up, torch.bfloat16))

    def _second(self, gate_up: Tensor) -> Tensor:
        q = ops.swiglu_quantize(gate_up, self.act.name, floor=self.first.numerics.act_floor)
        return ops.matmul(q, self.down, torch.bfloat16)

    def layers(
        self, rank: int, size: int, group: Group, *, split: bool, chunks: int = 1, sums: str = "float32"
    ) -> tuple[ColumnParallelLinear, RowParallelLinear]:
        inner, w = self.s.inner, self.gate_up
        ranges = cut(inner, size, 128)
        rows = tuple(((b, e), (inner + b, inner + e)) for b, e in ranges)
        first = take(w, piece(w.shape[-2:], w.format, rows=rows[rank]))
        part = piece(self.down.shape[-2:], self.down.format, cols=ranges, rank=rank, group=128)
        rows = rows if group.size > 1 else (rows[rank],)
        return (
            ColumnParallelLinear(first, group=group, rows=rows, rows_of_x=split, numerics=self.numerics),
            RowParallelLinear(
                take(self.down, part),
                group=group,
                part=part,
                scatter=split,
                chunks=chunks,
                met=split,
                numerics=f"{self.numerics},sums={sums}",
            ),
        )

    def tokens_split(
        self, rank: int, size: int, group: Group, chunks: int = 1, sums: str = "float32", normed: bool = False
    ) -> ParallelMLP:
        norm = (self.norm, EPS) if normed else None
        return ParallelMLP(*self.layers(rank, size, group, split=True, sums=sums), chunks=chunks, norm=norm)

    def tokens_everywhere(self, rank: int, size: int, group: Group) -> Everywhere:
        return Everywhere(self, *self.layers(rank, size, group, split=False))


class Everywhere:
    """All ranks hold all tokens; one all-reduce in fp32 at the end."""

    def __init__(self, mlp: Mlp, first: ColumnParallelLinear, second: RowParallelLinear) -> None:
        self.mlp, self.first, self.second = mlp, first, second

    def __call__(self, x: Tensor) -> Tensor:
        floor = self.mlp.first.numerics.act_floor
        return self.second.from_quantized(ops.swiglu_quantize(self.first(x), self.mlp.act.name, floor=floor))


class Moe:
    """V3's routed experts."""

    def __init__(self, s: Sizes, device: torch.device, numerics: str) -> None:
        self.s, self.numerics = s, numerics
        self.gate_up = random_weight((s.experts, 2 * s.expert_inner, s.hidden), device, 8)
        self.down = random_weight((s.experts, s.hidden, s.expert_inner), device, 9)
        self.whole = nn.Experts(self.gate_up, self.down, numerics=numerics)

    def routing(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        g = torch.Generator(device).manual_seed(11)
        chosen = torch.rand(rows, self.s.experts, device=device, generator=g).topk(self.s.top_k).indices
        return chosen, torch.rand(rows, self.s.top_k, device=device, generator=g) / self.s.top_k

    def spread(self, rank: int, size: int, group: Group, exchange: str) -> ParallelExperts:
        """Whole experts over ranks. The weights are views of the whole stack: nothing is held twice."""
        owners = shares(self.s.experts, size)
        begin, end = owners[rank]
        part = piece(self.down.shape[-2:], self.down.format)

        def some(w: BlockScaled) -> BlockScaled:
            return BlockScaled(w.data[begin:end], w.scale[begin:end], w.format)

        return ParallelExperts(
            some(self.gate_up), some(self.down), outer=group, inner=Group(), owners=owners, part=part,
            exchange=exchange, numerics=self.numerics,
        )  # fmt: skip
