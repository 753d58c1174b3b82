"""Linear layers with weights in blocks of 32x32 and E8M0 scales, as DeepSeek-V4.1 stores them, on a CUDA device.

    python bench/small_blocks.py [--nk "N,K;N,K"] [--m 1,16] [--out FILE]

Competitors, all from bf16 x to bf16 y, activations quantized in groups of 32 (numerics "deepseek_v4_1"): the kernel
that `linear` picks, `triton.codec`, torch's bf16 matmul with weights that were dequantized beforehand, and our own
kernels on weights of the same size in blocks of 128x128. CUDA graphs over operands that leave L2, replays interleaved,
medians. A kernel is timed after its result was compared with fp64 products of the dequantized operands.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockscale import ops, reference
from blockscale.formats import get_format
from blockscale.kernels.gluon.launch import release_graph_tickets
from blockscale.kernels.gluon.measure import ROTATE_BYTES, graph, interleaved
from blockscale.numerics import get_numerics
from blockscale.platform import detect
from blockscale.registry import select
from blockscale.tensor import BlockScaled

NUMERICS = "deepseek_v4_1"
WORST_ROW = 6e-3
Calls = list[Callable[[], Tensor]]


def weights(n: int, k: int, copies: int, format: str) -> list[BlockScaled]:
    """Random codes and scales."""
    fmt = get_format(format)
    made = []
    for _ in range(copies):
        data = torch.randn(n, k, device="cuda").clamp(-4, 4).to(fmt.element.dtype)
        shape = fmt.scale_shape(n, k)
        if fmt.scale_dtype == torch.float32:
            scale = torch.rand(*shape, device="cuda") * 1e-2 + 1e-3
        else:
            scale = torch.randint(118, 124, shape, device="cuda", dtype=torch.uint8).view(fmt.scale_dtype)
        made.append(BlockScaled(data, scale, fmt))
    return made


def worst_row(y: Tensor, x: Tensor, w: BlockScaled, numerics: str) -> float:
    """Largest relative error of sixteen rows; infinite where a result is not finite."""
    rows = torch.linspace(0, x.shape[0] - 1, min(16, x.shape[0]), device="cuda").long()
    policy = get_numerics(numerics)
    act = policy.activation_format(w.format)
    assert act is not None
    q = reference.quantize(x[rows], act, floor=policy.act_floor)
    want = reference.dequantize(q).double() @ reference.dequantize(w).double().T
    if not torch.isfinite(y).all():
        return float("inf")
    return float(((y[rows].double() - want).norm(dim=1) / want.norm(dim=1)).max())


def row(m: int, n: int, k: int) -> dict[str, Any]:
    """Microseconds of every competitor at one shape, or why there is none."""
    copies = max(2, min(24, -(-int(ROTATE_BYTES) // (n * k))))
    small, wide = weights(n, k, copies, "fp8_32x32_ue8m0"), weights(n, k, copies, "fp8_128x128")
    dense = [reference.dequantize(w, torch.bfloat16) for w in small[: max(2, copies // 2)]]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    picked = select(ops.linear_problem(small[0], x.dtype, NUMERICS), detect("cuda")).pick(m).name
    calls: dict[str, Calls] = {
        "picked": [lambda w=w: ops.linear(x, w, numerics=NUMERICS) for w in small],
        "codec": [lambda w=w: ops.linear(x, w, numerics=NUMERICS, kernel="triton.codec") for w in small],
        "bf16": [lambda w=w: x @ w.T for w in dense],
        "128x128": [lambda w=w: ops.linear(x, w) for w in wide],
    }  # fmt: skip
    checked = {"picked": (small, NUMERICS), "codec": (small, NUMERICS), "128x128": (wide, "checkpoint")}
    found: dict[str, Any] = {"m": m, "n": n, "k": k, "kernel": picked}
    graphs = {}
    for name, bound in calls.items():
        y = bound[0]()
        error = worst_row(y, x, checked[name][0][0], checked[name][1]) if name in checked else 0.0
        if error < WORST_ROW:
            graphs[name] = graph(bound, len(small))
        else:
            found[name] = f"wrong: worst row {error:.2e}"
    found |= {name: round(us, 2) for name, us in interleaved(graphs, len(small), 9).items()}
    release_graph_tickets()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nk", default="2048,7168;7168,2048;18432,7168")
    parser.add_argument("--m", default="1,16,64,512,4096")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for nk in args.nk.split(";"):
        n, k = map(int, nk.split(","))
        for m in map(int, args.m.split(",")):
            rows.append(row(m, n, k))
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
