"""Compile what bench/parallel.py will launch, on one GPU and in several processes, before ranks wait for each other.

    for i in 0 1 2 3; do CUDA_VISIBLE_DEVICES=$((i % 2)) python bench/parallel_warm.py $i/4 & done; wait

Each process makes every fourth of the calls. Kernels end up in Triton's cache, where the ranks find them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from blockscale import ops
from blockscale.parallel import Group, turns
from blockscale.parallel.cuts import shares
from blockscale.parallel.linear import reads
from parallel_layers import DEEPSEEK, NUMERICS, TINY, Attention, Mlp, Sizes, SpreadAttention, tokens


def calls(s: Sizes, device: torch.device) -> list[Callable[[], object]]:
    """Of the first of two ranks, without what travels."""
    attention, mlp = Attention(s, device, NUMERICS), Mlp(s, device, NUMERICS)
    spread, alone = SpreadAttention(attention, 0, 2, Group(), False), mlp.tokens_everywhere(0, 2, Group())
    width = (spread.heads[1] - spread.heads[0]) * s.value
    found: list[Callable[[], object]] = []
    for m in (*s.prefill, *s.decode):
        x, inner = tokens(m, s.hidden, device), tokens(m, s.heads * s.value, device)
        part = inner[:, :width].contiguous()
        for layer, given in (("q_a", x), ("kv_a", x), ("o", inner)):
            found.append(lambda layer=layer, given=given: attention.layers[layer](given))
        found += [
            lambda x=x: mlp.whole(x),
            lambda x=x, inner=inner: attention.whole(x, inner),
            lambda x=x: alone(x),
            lambda x=x, part=part: spread(x, part),
        ]
    for t in s.prefill:
        mine = tokens(t // 2, s.hidden, device)
        found += [lambda mine=mine, name=name: attention.layers[name](mine) for name in ("q_a", "kv_a")]
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
        for b, e in turns.regions(shares(t, 2), 0, s.hidden, processors):
            found.append(lambda rows=e - b: _region(mlp, rows, device))
            found.append(lambda rows=e - b: spread.o(tokens(rows, width, device)))
    return found


def _region(mlp: Mlp, rows: int, device: torch.device) -> None:
    first, second = mlp.layers(0, 2, Group(), split=True)
    layout = reads(second, mlp.act, rows, torch.float32)
    gate_up = first.multiply_sent(first.rows_to_send(tokens(rows, mlp.s.hidden, device)), torch.bfloat16)
    second.multiply_quantized(ops.swiglu_quantize(gate_up, mlp.act.name, layout=layout))


def main() -> None:
    number, _, count = sys.argv[1].partition("/")
    device = torch.device(sys.argv[2] if len(sys.argv) > 2 else "cuda")
    with torch.inference_mode():
        for call in calls(DEEPSEEK if device.type == "cuda" else TINY, device)[int(number) :: int(count)]:
            call()


if __name__ == "__main__":
    main()
