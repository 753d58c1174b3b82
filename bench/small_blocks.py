"""Linear layers and experts whose scales serve 16 or 32 elements, as DeepSeek-V4.1, MXFP8, MXFP4 and NVFP4 have them.

    python bench/small_blocks.py [--formats NAME,NAME] [--nk "N,K;N,K"] [--m 1,16] [--experts] [--out FILE]

Competitors on a CUDA device, all from bf16 x to bf16 y, activations quantized as the format's model does: the kernel
that `linear` picks, weight-only multiplication with the same weights (x stays bf16), torch's bf16 matmul with weights
that were dequantized beforehand, and our own kernels on FP8 weights of the same size in blocks of 128x128. CUDA graphs
over operands that leave L2, replays interleaved, medians. A kernel is timed after its result was compared with fp64
products of the dequantized operands. --experts: 32 experts of each format, rows sorted, beside blocks of 128x128.
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

NUMERICS = {
    "fp8_32x32_ue8m0": "deepseek_v4_1", "mxfp8": "checkpoint", "mxfp4": "deepseek_v4", "nvfp4": "checkpoint",
    "fp8_128x128": "checkpoint",
}  # fmt: skip
EXPERTS = 32
WORST_ROW = 6e-3
Calls = list[Callable[[], Tensor]]


def weights(n: int, k: int, copies: int, format: str, experts: int = 0) -> list[BlockScaled]:
    """Random codes and scales."""
    fmt, lead = get_format(format), (experts,) if experts else ()
    made = []
    for _ in range(copies):
        if fmt.packed:
            data = torch.randint(0, 256, (*lead, *fmt.data_shape(n, k)), device="cuda", dtype=torch.uint8)
        else:
            data = torch.randn(*lead, n, k, device="cuda").clamp(-4, 4).to(fmt.element.dtype)
        shape, level = (*lead, *fmt.scale_shape(n, k)), None
        if fmt.two_level:
            scale, level = torch.rand(shape, device="cuda").to(fmt.scale_dtype), torch.full(lead, 0.01, device="cuda")
        elif fmt.scale_dtype == torch.float32:
            scale = torch.rand(shape, device="cuda") * 1e-2 + 1e-3
        else:
            scale = torch.randint(118, 124, shape, device="cuda", dtype=torch.uint8).view(fmt.scale_dtype)
        made.append(BlockScaled.trusted(data, scale, fmt, "row", (*lead, n, k), level))
    return made


def worst_row(y: Tensor, x: Tensor, w: BlockScaled, numerics: str) -> float:
    """Largest relative error of sixteen rows; infinite where a result is not finite."""
    rows = torch.linspace(0, x.shape[0] - 1, min(16, x.shape[0]), device="cuda").long()
    want = reference.activations(x, w, get_numerics(numerics))[rows].double() @ reference.dequantize(w).double().T
    if not torch.isfinite(y).all():
        return float("inf")
    return float(((y[rows].double() - want).norm(dim=1) / want.norm(dim=1)).max())


def row(format: str, m: int, n: int, k: int) -> dict[str, Any]:
    """Microseconds of every competitor at one shape, or why there is none."""
    copies = max(2, min(24, -(-int(ROTATE_BYTES) // (n * k))))
    small, wide = weights(n, k, copies, format), weights(n, k, copies, "fp8_128x128")
    dense = [reference.dequantize(w, torch.bfloat16) for w in small[: max(2, copies // 2)]]
    x, numerics = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), NUMERICS[format]
    picked = select(ops.linear_problem(small[0], x.dtype, numerics), detect("cuda")).pick(m).name
    rival = {"picked": (small, numerics), "weight_only": (small, "weight_only"), "128x128": (wide, "checkpoint")}
    calls: dict[str, Calls] = {
        name: [lambda w=w, how=how: ops.linear(x, w, numerics=how) for w in ws] for name, (ws, how) in rival.items()
    }
    calls["bf16"] = [lambda w=w: x @ w.T for w in dense]
    found: dict[str, Any] = {"format": format, "m": m, "n": n, "k": k, "kernel": picked}
    graphs = {}
    for name, bound in calls.items():
        y = bound[0]()
        error = worst_row(y, x, rival[name][0][0], rival[name][1]) if name in rival else 0.0
        if error < WORST_ROW:
            graphs[name] = graph(bound, len(small))
        else:
            found[name] = f"wrong: worst row {error:.2e}"
    found |= {name: round(us, 2) for name, us in interleaved(graphs, len(small), 9).items()}
    release_graph_tickets()
    return found


def experts_row(m: int, n: int, k: int) -> dict[str, Any]:
    """Microseconds of m sorted rows through EXPERTS experts of each format."""
    offsets = torch.arange(1, EXPERTS + 1, device="cuda", dtype=torch.int32) * (m // EXPERTS)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    found: dict[str, Any] = {"experts": EXPERTS, "m": m, "n": n, "k": k}
    graphs, held = {}, []
    for format, numerics in NUMERICS.items():
        ws = weights(n, k, 2, format, EXPERTS)
        held.append(ws)  # graphs read them until the end
        y, first = ops.grouped_linear(x, ws[0], offsets, numerics=numerics), m // EXPERTS
        error = worst_row(y[:first], x[:first], ws[0][0], numerics)
        if error < WORST_ROW:
            graphs[format] = graph(
                [lambda w=w, how=numerics: ops.grouped_linear(x, w, offsets, numerics=how) for w in ws], 2
            )
        else:
            found[format] = f"wrong: worst row {error:.2e}"
    return found | {name: round(us, 1) for name, us in interleaved(graphs, 2, 9).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="fp8_32x32_ue8m0")
    parser.add_argument("--nk", default="2048,7168;7168,2048;18432,7168")
    parser.add_argument("--m", default="1,16,64,128,256,512,4096")
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    shapes = [tuple(map(int, nk.split(","))) for nk in args.nk.split(";")]
    asked = [
        (format, m, n, k) for format in args.formats.split(",") for n, k in shapes for m in map(int, args.m.split(","))
    ]
    made = (
        (experts_row(m, n, k) for m in (64, 2048, 8192) for n, k in shapes[:2])
        if args.experts
        else (row(*one) for one in asked)
    )
    for one in made:
        rows.append(one)
        print(json.dumps(one), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
