"""Short groups with scales that 16 bits hold, on a CUDA device: every tile against fp64, bytes, graphs, torch.compile.

Part of `triton_checks.py`. M goes through every kernel and tile: pointers, weights decoded in registers (bm of 32 to
256, with and without a split of K), weights decoded beforehand in one and in several slices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import blockscale
from blockscale import reference
from blockscale.formats import get_format
from blockscale.kernels.triton import capability, gemm, grouped
from blockscale.kernels.triton import quantize as q
from blockscale.numerics import get_numerics
from blockscale.platform import detect

FORMATS = (
    ("fp8_32x32_ue8m0", "deepseek_v4_1"), ("mxfp8", "checkpoint"), ("mxfp4", "deepseek_v4"), ("nvfp4", "checkpoint"),
    ("fp8_1x64_ue8m0", "checkpoint"), ("fp8e5m2_32x32_ue8m0", "checkpoint"),
)  # fmt: skip
ROWS = (1, 9, 17, 33, 65, 129, 257, 512, 513, 1500)
SHAPES = ((328, 1056), (2048, 512), (8576, 320))
"""(N, K): ragged against every tile; enough tiles for one slice of K; the tiles of wide weights."""
EXACT = 2e-6
"""fp32 sums of a thousand products, relative to the row."""


def check_exact() -> Iterator[str]:
    """fp32 results of every format, row count and shape against fp64; NaN exactly where the definition has it."""
    p = detect("cuda")
    for name, policy in FORMATS:
        numerics = get_numerics(policy)
        for n, k in SHAPES[: 3 if name in ("fp8_32x32_ue8m0", "mxfp4") else 1]:
            w = reference.quantize(torch.randn(n, k), get_format(name)).to("cuda")
            bias = torch.randn(n, device="cuda")
            for m in ROWS:
                x = torch.randn(m, k, device="cuda")
                want = reference.linear(x, w, bias, numerics=numerics)
                y = gemm.linear(x, w, bias, numerics, torch.float32, p)
                error = float(((y - want).double().norm(dim=1) / want.double().norm(dim=1)).max())
                again = gemm.linear(x, w, bias, numerics, torch.float32, p)
                if not error < EXACT:
                    yield f"{name} {m}x{n}x{k}: worst row {error:.2g}"
                if not torch.equal(y, again):
                    yield f"{name} {m}x{n}x{k}: two runs differ"
        for m in ROWS:
            x, w = torch.randn(m, 256, device="cuda"), reference.quantize(torch.randn(96, 256), get_format(name))
            w.scale.view(torch.uint8)[1, 3] = 255 if w.scale.dtype == torch.float8_e8m0fnu else 0x7F
            w = w.to("cuda")
            x[m - 1, 5] = torch.inf
            y, want = gemm.linear(x, w, None, numerics, torch.float32, p), reference.linear(x, w, numerics=numerics)
            if not torch.equal(y.isnan(), want.isnan()):
                yield f"{name} M={m}: {int((y.isnan() != want.isnan()).sum())} results are NaN or not, wrongly"


def awkward(rows: int, columns: int) -> torch.Tensor:
    """Random numbers of many magnitudes; rows 0 to 2: zeros; non-finite, subnormal and saturating ones; ties."""
    x = torch.randn(rows, columns) * torch.exp(torch.randn(rows, 1) * 8)
    x[0], x[1, :9] = 0, torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-40, -1e-40, 1e38, 448.0, 464.0])
    x[2] = (torch.arange(columns) % 449) + 0.5
    return x


def check_values() -> Iterator[str]:
    """Activations as values times scales: the numbers of the definition, by the chip's cast and by the codec."""
    p = detect("cuda")
    x, k = awkward(512, 2048), torch.arange(2048)
    lies = (k & -32) | ((k & 4) << 2) | ((k & 2) << 2) | ((k & 24) >> 2) | (k & 1)
    for name in ("fp8_1x32_ue8m0", "fp8_1x128_ue8m0", "mxfp8", "mxfp4", "nvfp4"):
        fmt = get_format(name)
        for rows in (4, 512):
            given = x[:rows].bfloat16()
            quantized = reference.quantize(given, fmt)
            level = quantized.global_scale
            want = reference.dequantize(quantized) / (1.0 if level is None else level)
            for platform in (p, capability.without_fp8(p)):
                for shuffled in (False, True):
                    got, _ = q.quantized_values(given.cuda(), fmt, platform, torch.bfloat16, shuffled=shuffled)
                    values = got.float().cpu()[:, lies] if shuffled else got.float().cpu()
                    wrong = ~(torch.isclose(values, want, rtol=1e-6 if fmt.two_level else 0, atol=0, equal_nan=True))
                    if wrong.any():
                        yield f"{name}, {rows} rows, shuffled={shuffled}: {int(wrong.sum())} differ"


def check_calls() -> Iterator[str]:
    """A captured linear and experts, replayed on new input, equal the eager call; so does torch.compile."""
    p, numerics = detect("cuda"), get_numerics("deepseek_v4_1")
    w = reference.quantize(torch.randn(640, 1024), get_format("fp8_32x32_ue8m0")).to("cuda")
    experts = reference.quantize(torch.randn(4, 256, 1024), get_format("mxfp4")).to("cuda")
    for m in (1, 40, 200, 700):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
        offsets = torch.tensor([m // 4, m // 2, m // 2, m], dtype=torch.int32, device="cuda")

        def step(x: torch.Tensor = x, offsets: torch.Tensor = offsets) -> list[torch.Tensor]:
            return [
                gemm.linear(x, w, None, numerics, torch.bfloat16, p),
                grouped.grouped_linear(x, experts, offsets, numerics, torch.bfloat16, p),
            ]

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            if not all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True)):
                yield f"M={m}: the replay differs from the eager call"

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(blockscale.linear(x, w, numerics="deepseek_v4_1")) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (3, 70, 700):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
        if not torch.equal(compiled(x), layer(x)):
            yield f"M={m}: compiled differs from eager"
