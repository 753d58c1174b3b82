"""Is it right on this device? What the interpreter cannot show: native casts, fused division, graphs, torch.compile.

    python bench/triton_checks.py        exit status 1 if one fails

Results over formats, shapes and edges: `blockscale conformance --device cuda --kernel triton --workers 14`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

import blockscale
import exact_checks
from blockscale import layouts, reference
from blockscale.formats import get_format
from blockscale.kernels.triton import capability, gemm, grouped
from blockscale.kernels.triton import quantize as q
from blockscale.kernels.triton.codec import decode, encode
from blockscale.kernels.triton.ptx import decode_fp4_ptx, decode_ptx, decode_ptx_checked
from blockscale.numerics import get_numerics
from blockscale.platform import detect
from blockscale.tensor import BlockScaled
from blockscale.tuning import GemmTile


@triton.jit
def empty_kernel(ptr):
    """What a launch costs."""


@triton.jit
def encode_kernel(x_ptr, y_ptr, ELEMENT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, encode(tl.load(x_ptr + at), ELEMENT))


@triton.jit
def decode_kernel(x_ptr, y_ptr, ELEMENT: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    if ELEMENT == "ptx":
        tl.store(y_ptr + at, decode_ptx(tl.load(x_ptr + at), y_ptr.dtype.element_ty))
    elif ELEMENT == "ptx checked":
        tl.store(y_ptr + at, decode_ptx_checked(tl.load(x_ptr + at)))
    elif ELEMENT == "fp4 ptx":
        pairs = tl.arange(0, 2)[:, None] * N + tl.arange(0, N)[None, :]
        half = tl.arange(0, 2)[:, None] * (N // 2) + tl.arange(0, N // 2)[None, :]
        tl.store(y_ptr + pairs, decode_fp4_ptx(tl.load(x_ptr + half), y_ptr.dtype.element_ty))
    else:
        tl.store(y_ptr + at, decode(tl.load(x_ptr + at), ELEMENT, y_ptr.dtype.element_ty))


def same(a: torch.Tensor, b: torch.Tensor) -> int:
    """Bytes that differ."""
    a, b = (t.cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return int((a != b).sum()) if a.numel() == b.numel() else -1


def check_codec() -> Iterator[str]:
    """Encoder on 16 M bit patterns, decoder on all codes, against torch."""
    bits = torch.randint(-(2**31), 2**31, (1 << 24,), dtype=torch.int64).to(torch.int32)
    bits[: 1 << 16] = torch.arange(1 << 16, dtype=torch.int32) << 16
    x = bits.view(torch.float32)
    for name in ("fp8_tensor", "fp8e5m2_tensor", "fp8fnuz_tensor", "mxfp4"):
        fmt = get_format(name)
        y = torch.empty(x.numel(), dtype=torch.uint8, device="cuda")
        encode_kernel[(x.numel() // 4096,)](x.cuda(), y, ELEMENT=fmt.element.name, BLOCK=4096)
        if bad := same(y, reference.encode(x, fmt)):
            yield f"{fmt.element.name}: {bad} of {x.numel()} codes differ"
        n = 16 if fmt.packed else 256
        codes = torch.arange(n, dtype=torch.uint8)
        want = reference.decode(codes, fmt)[::2] if fmt.packed else codes.view(fmt.element.dtype).float()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            got = torch.empty(n, dtype=dtype, device="cuda")
            decode_kernel[(1,)](codes.cuda(), got, ELEMENT=fmt.element.name, N=n)
            if not torch.equal(got.float().cpu().nan_to_num(1e9), want.nan_to_num(1e9)):
                yield f"{fmt.element.name} -> {dtype}: differs"


def check_ptx() -> Iterator[str]:
    """The four-at-a-time decoder on all bytes."""
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(torch.float8_e4m3fn).float()
    for dtype, lift in ((torch.float16, 256.0), (torch.bfloat16, 1.0)):
        got = torch.empty(256, dtype=dtype, device="cuda")
        decode_kernel[(1,)](codes.cuda(), got, ELEMENT="ptx", N=256)
        bad = (got.float().cpu() * lift).nan_to_num(1e9) != want.nan_to_num(1e9)
        if bad.any():
            yield f"{dtype}: {bad.nonzero().flatten().tolist()[:8]} decode to {got.float().cpu()[bad][:8].tolist()}"
        if dtype == torch.float16:
            decode_kernel[(1,)](codes.cuda(), got, ELEMENT="ptx checked", N=256)
            times, is_nan = got.float().cpu(), want.isnan()
            if not torch.equal(times[~is_nan], want[~is_nan] * 144) or not times[is_nan].isinf().all():
                yield "checked: not 144 times the value, or a NaN code that is not infinite"
        got = torch.empty(512, dtype=dtype, device="cuda")
        decode_kernel[(1,)](codes.cuda(), got, ELEMENT="fp4 ptx", N=256)
        lift = 2.0**14 if dtype == torch.float16 else 1.0
        if not torch.equal(got.float().cpu() * lift, reference.decode(codes, get_format("mxfp4"))):
            yield f"FP4 -> {dtype}: differs"


def check_quantize() -> Iterator[str]:
    """Native casts and fused division against the reference's bytes: random, tiny, huge, tied, non-finite, -0."""
    p = detect("cuda")
    x = exact_checks.awkward(1024, 7168)
    x[3:400] *= 1e-12
    for dtype in (torch.float32, torch.bfloat16):
        for name in (
            "fp8_1x128",
            "fp8_1x128_ue8m0",
            "fp8_1x32_ue8m0",
            "mxfp8",
            "mxfp4",
            "nvfp4",
            "fp8_row",
            "fp8_tensor",
            "fp8_128x128",
        ):
            fmt, given = get_format(name), x.to(dtype)
            want = reference.quantize(given, fmt)
            for platform in (p, capability.without_fp8(p)):
                got = q.quantize(given.cuda(), fmt, platform)
                data, scale = same(got.data, want.data), same(got.scale, want.scale)
                if data or scale:
                    yield f"{name} {dtype} {platform.arch}: {data} data and {scale} scale bytes differ"
    fmt, steps = get_format("fp8_1x2048"), torch.arange(1024) / 1024
    for exponent in range(14):  # every significand of 11 bits divided by the scale of every other
        small = ((1 + steps) * 2.0**-exponent).expand(1024, 1024)
        given = torch.cat([torch.where(small <= 1 + steps[:, None], small, 0.0), (1 + steps)[:, None]], 1)
        given = torch.nn.functional.pad(given, (0, 1023)).half()
        got, want = q.quantize(given.cuda(), fmt, p), reference.quantize(given, fmt)
        if same(got.data, want.data) or same(got.scale, want.scale):
            yield f"quotients near 2^-{exponent}: {same(got.data, want.data)} bytes differ"
    packed = q.quantize(x.cuda(), get_format("fp8_1x128_ue8m0"), p, layout="ue8m0x4")
    if same(packed.scale, layouts.convert(reference.quantize(x, get_format("fp8_1x128_ue8m0")), "ue8m0x4").scale):
        yield "ue8m0x4 scales differ"


def check_graph() -> Iterator[str]:
    """A captured linear and grouped linear, replayed on new input, equals the eager call, byte for byte."""
    p, numerics = detect("cuda"), get_numerics("checkpoint")
    w = reference.quantize(torch.randn(640, 1024), get_format("fp8_128x128")).to("cuda")
    experts = reference.quantize(torch.randn(4, 256, 1024), get_format("fp8_128x128")).to("cuda")
    offsets = torch.tensor([1, 1, 5, 9], dtype=torch.int32, device="cuda")
    for m in (1, 16, 200):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
        rows = torch.randn(12, 1024, device="cuda", dtype=torch.bfloat16)

        def step(x: torch.Tensor = x, rows: torch.Tensor = rows) -> list[torch.Tensor]:
            kinds = (("sorted", offsets), ("masked", offsets.clamp(max=3)), ("pairs", offsets.reshape(2, 2)))
            ys = [gemm.linear(x, w, None, numerics, torch.bfloat16, p)]
            for kind, where in kinds:
                held = rows if kind != "pairs" else rows[:2]
                ys.append(grouped.grouped_linear(held, experts, where, numerics, torch.bfloat16, p, rows=kind))
            return ys

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            rows.copy_(torch.randn_like(rows))
            graph.replay()
            if any(same(a, b) for a, b in zip(captured, step(), strict=True)):
                yield f"M={m}: the replay differs from the eager call"


def check_compile() -> Iterator[str]:
    """torch.compile, fullgraph, sees one opaque op: same result as eager, no fp8 in inductor."""
    w = reference.quantize(torch.randn(640, 1024), get_format("fp8_128x128")).to("cuda")

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(blockscale.linear(x, w, kernel="triton.block")) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (3, 70):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
        if same(compiled(x), layer(x)):
            yield f"M={m}: compiled differs from eager"


def check_repeat() -> Iterator[str]:
    """Same bytes every time (split-K included), and whatever the batch where that was ordered."""
    p, numerics = detect("cuda"), get_numerics("checkpoint")
    w = reference.quantize(torch.randn(320, 7168), get_format("fp8_128x128")).to("cuda")
    x = torch.randn(300, 7168, device="cuda", dtype=torch.bfloat16)
    for m in (1, 16, 64, 300):
        ys = [gemm.linear(x[:m], w, None, numerics, torch.bfloat16, p) for _ in range(10)]
        if any(same(ys[0], y) for y in ys):
            yield f"M={m}: two runs differ"
    for m in (128, 256):
        ys = [gemm.linear(x[:m], w, None, numerics, torch.bfloat16, p, native=False) for _ in range(10)]
        if any(same(ys[0], y) for y in ys):
            yield f"codec, M={m}: two runs differ"
    ys = [gemm.linear(x[:m], w, None, numerics, torch.bfloat16, p, invariant=True)[:1] for m in (1, 2, 17, 64, 65, 300)]
    if any(same(ys[0], y) for y in ys):
        yield "invariant: a row's bytes depend on M"
    big = torch.full((70000, 128), 3.0, device="cuda", dtype=torch.bfloat16)
    if float(q.quantize(big, get_format("fp8_1x128"), p).scale.min()) <= 0:
        yield "70000 rows: not all quantized"


def check_rescaled() -> Iterator[str]:
    """One sum in units of the scale at hand, and the tiles that must not take that way: against fp64."""
    p, k = detect("cuda"), 1024
    w = reference.quantize(torch.randn(320, k), get_format("fp8_128x128")).to("cuda")
    xq = q.quantize(torch.randn(600, k, device="cuda"), get_format("fp8_1x128"), p, layout="tma")
    tile = GemmTile(128, 128, 64, 4, 3, "check", rescaled=True)
    for name in ("plain", "random scales", "zeros", "2^90 apart", "tiny"):
        scale = xq.scale.clone()  # [groups, rows]
        if name == "random scales":
            scale *= torch.exp2(torch.randint(-30, 30, scale.shape, device="cuda").float())
        elif name == "zeros":
            scale[::3, ::7] = 0
        elif name == "2^90 apart":
            scale[4:, 5::50] *= 2.0**90
        elif name == "tiny":
            scale[:, 130] *= 2.0**-100
        x = replace(xq, scale=scale)
        held = replace(x, data=x.data.to(torch.float16))
        want = reference.dequantize(x).double() @ reference.dequantize(w).double().T
        for columns in (320, 128):
            part = BlockScaled.trusted(w.data[:columns], w.scale[: -(-columns // 128)], w.format, "row", (columns, k))
            y = gemm.matmul(held, part, p, out_dtype=torch.float32, native=False, tile=tile).double()
            error = (y - want[:, :columns]).norm(dim=1) / want[:, :columns].norm(dim=1).clamp(min=1e-300)
            if not float(error.max()) < 2e-6:
                yield f"{name}: worst row error {float(error.max()):.2g} with {columns} columns"
    xq.scale[3, 17] = torch.nan
    y = gemm.matmul(replace(xq, data=xq.data.to(torch.float16)), w, p, native=False, tile=tile)
    if not y[17].isnan().all() or not torch.isfinite(y[torch.arange(600, device="cuda") != 17]).all():
        yield "NaN scale: not exactly its row is NaN"


CHECKS: dict[str, Callable[[], Iterator[str]]] = {
    "codec": check_codec, "PTX decoder": check_ptx, "quantize bytes": check_quantize, "CUDA graph": check_graph,
    "torch.compile": check_compile, "determinism": check_repeat, "rescaled sums": check_rescaled,
    "exact products": exact_checks.check_exact, "exact values": exact_checks.check_values,
    "exact, graph and compile": exact_checks.check_calls,
}  # fmt: skip


def run_checks() -> dict[str, list[str]]:
    """{check: what is wrong}; empty lists where all is right."""
    results = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            results[name] = list(check())
        except Exception as e:
            results[name] = [f"{type(e).__name__}: {str(e)[-400:]}"]
        print(f"{name}: {'; '.join(results[name]) or 'ok'}", flush=True)
    return results


if __name__ == "__main__":
    sys.exit(int(any(run_checks().values())))
