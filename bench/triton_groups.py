"""What `triton_bench.py` times: groups of competitors on the same operands, with a check of each result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from blockscale import reference
from blockscale.formats import get_format
from blockscale.kernels.triton import capability, gemm, gemm_kernels, grouped
from blockscale.kernels.triton import quantize as q
from blockscale.platform import Platform, detect
from blockscale.tensor import BlockScaled
from blockscale.tuning import GemmTile
from triton_checks import empty_kernel

L2_BYTES = 200 << 20
SHAPES = ((2112, 7168), (24576, 1536), (7168, 16384), (7168, 2048), (4096, 7168))
"""(N, K) of DeepSeek-V3's linears."""
Calls = dict[str, Callable[[int], Any]]
"""Competitors: name -> call on operand set i."""


class Group:
    """Competitors on the same operands. check(name) -> error; sets: how many operand sets rotate."""

    def __init__(self, name: str, sets: int, calls: Calls, check: Callable[[str, Any], float] | None = None) -> None:
        self.name, self.sets, self.calls, self.check = name, sets, calls, check


def deep_gemm() -> Any | None:
    try:
        import deep_gemm as module
    except Exception as e:
        print(f"DeepGEMM: not a peer in this run ({type(e).__name__}: {str(e)[:80]})")
        return None
    return module


def weights(n: int, k: int, sets: int, experts: int = 0, fmt: str = "fp8_128x128") -> list[BlockScaled]:
    """Random codes and scales; made on the device, so any number is quick."""
    f, lead = get_format(fmt), (experts,) if experts else ()
    made = []
    for _ in range(sets):
        if f.packed:
            data = torch.randint(0, 256, (*lead, *f.data_shape(n, k)), device="cuda", dtype=torch.uint8)
        else:
            data = torch.randn(*lead, n, k, device="cuda").clamp(-4, 4).to(f.element.dtype)
        if f.scale_dtype == torch.float32:
            scale = torch.rand(*lead, *f.scale_shape(n, k), device="cuda") * 1e-2 + 1e-3
        else:
            codes = torch.randint(118, 124, (*lead, *f.scale_shape(n, k)), device="cuda", dtype=torch.uint8)
            scale = codes.view(f.scale_dtype)
        level = torch.ones(lead, device="cuda") if f.two_level else None
        made.append(BlockScaled.trusted(data, scale, f, "row", (*lead, n, k), level))
    return made


def activations(m: int, k: int, sets: int) -> list[BlockScaled]:
    p = detect("cuda")
    xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    return [q.quantize(x, get_format("fp8_1x128"), p, layout="tma") for x in xs]


def as_values(x: BlockScaled) -> BlockScaled:
    """Codes as fp16, which is how `linear` hands them over where there is no fp8 instruction."""
    return replace(x, data=x.data.to(torch.float16))


def row_error(x: BlockScaled | torch.Tensor, w: BlockScaled) -> Callable[[Any], float]:
    """Worst relative error of eight rows against fp64; infinite where the result is not finite."""
    rows = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], 8)).long().cuda()
    known: list[torch.Tensor] = []  # made when first asked for: processes that only compile have no use for it

    def check(y: Any) -> float:
        if not known:
            values = (reference.dequantize(x) if isinstance(x, BlockScaled) else x)[rows].double()
            known.append(values @ reference.dequantize(w).double().T)
        want = known[0]
        if not torch.isfinite(y).all():
            return float("inf")
        return float(((y[rows].double() - want).norm(dim=1) / want.norm(dim=1)).max())

    return check


def ampere(p: Platform) -> Platform:
    """This chip taken for the generation before it: no FP8, no block copies, the tiles that such a chip gets, and
    multiplications compiled for sm_80 (mma.sync and cp.async; the driver's assembler takes them to this chip)."""
    return replace(p, arch="sm_80")


_options = capability.multiply_options
capability.multiply_options = lambda p: {"arch": "sm80"} if p.arch == "sm_80" else _options(p)


def without_scales(x: torch.Tensor, w: torch.Tensor, tile: GemmTile) -> torch.Tensor:
    """fp16 `[M, K]` times `[N, K]`, compiled for sm_80 from the same kernel: what its tiles reach where nothing is to
    decode and nothing to scale. K in whole steps."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    constants = dict.fromkeys(("X_GROUP", "W_GROUP", "W_ROWS", "SPAN"), 0) | dict.fromkeys(
        ("BIAS", "X_LEVEL", "W_LEVEL", "SWAP"), False
    )
    gemm_kernels.gemm_kernel[(-(-m // tile.bm) * -(-n // tile.bn), 1)](
        x, w, y, *[None] * 7, m, n, k, k, k, n, 0, 0, 0, 0, X_KIND="value", W_KIND="value", X_SCALE="none",
        W_SCALE="none", SX_KIND="float", SW_KIND="float", COMPUTE=tl.float16, LIFT=1.0, EVEN_K=True, BM=tile.bm,
        BN=tile.bn, BK=tile.bk, SPLIT=1, GROUP_M=tile.group_m, STAGES=tile.stages, num_warps=tile.warps, arch="sm80",
        **constants,
    )  # fmt: skip
    return y


PLAIN = {"fp16 sm_80": GemmTile(128, 128, 64, 8, 3, "plain"), "fp16 sm_80 wide": GemmTile(128, 256, 32, 8, 4, "plain")}


def gemm_groups(quick: bool, ms: tuple[int, ...] = (1, 16, 4096)) -> Iterator[Group]:
    """Multiplication of quantized operands: native, codec, the codec as sm_80 runs it, bf16, DeepGEMM."""
    p, peer = detect("cuda"), deep_gemm()
    for m in ms:
        for n, k in SHAPES[-1:] if quick else SHAPES:
            sets = max(2, min(48, -(-L2_BYTES // (n * k + m * k + 2 * m * n))))
            ws, xs = weights(n, k, sets), activations(m, k, sets)
            held = [as_values(x) for x in xs]
            dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, sets // 2))]
            xb = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            tickets = torch.zeros(1 << 16, device="cuda", dtype=torch.int32)
            calls: Calls = {
                "native": lambda i, xs=xs, ws=ws, t=tickets: gemm.matmul(xs[i], ws[i], p, tickets=t),
                "codec": lambda i, xs=held, ws=ws, t=tickets: gemm.matmul(xs[i], ws[i], p, tickets=t, native=False),
                "bf16": lambda i, xb=xb, d=dense: torch.matmul(xb, d[i % len(d)].T),
            }
            if m >= 512:
                halves = [w.data.to(torch.float16) for w in ws[:2]]
                for name, tile in PLAIN.items():
                    calls[name] = lambda i, xs=held, ws=halves, t=tile: without_scales(xs[i % 2].data, ws[i % 2], t)
            calls["codec sm_80"] = lambda i, xs=held, ws=ws, t=tickets: gemm.matmul(xs[i], ws[i], ampere(p), tickets=t)
            if m <= 512:
                calls["weight_only"] = lambda i, xb=xb, ws=ws, t=tickets: gemm.matmul(xb, ws[i], p, tickets=t)
            if peer:
                out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
                views = [x.scale.mT[:m] for x in xs]
                calls["deep_gemm"] = lambda i, xs=xs, ws=ws, v=views, o=out: (
                    peer.fp8_gemm_nt((xs[i].data, v[i]), (ws[i].data, ws[i].scale), o, disable_ue8m0_cast=True), o,
                )[1]  # fmt: skip
            own = row_error(xs[0], ws[0])
            by = {name: lambda y: 0.0 for name in ("bf16", *PLAIN)} | {"weight_only": row_error(xb, ws[0])}
            check = lambda name, y, own=own, by=by: by.get(name, own)(y)  # noqa: E731
            yield Group(f"gemm {m}x{n}x{k}", sets, calls, check)


def grouped_groups(quick: bool) -> Iterator[Group]:
    """Experts: 32 of them, 8192 rows, and a decode batch."""
    p, peer = detect("cuda"), deep_gemm()
    for n, k, t in ((4096, 7168, 8192), (7168, 2048, 8192), (4096, 7168, 64))[2 * quick :]:
        experts, sets = 32, 2
        ids = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(t // experts)
        offsets = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (t // experts)
        xs = activations(t, k, sets)
        for fmt in ("fp8_128x128", "mxfp4"):
            ws = weights(n, k, sets, experts, fmt)
            calls: Calls = {"native": lambda i, xs=xs, ws=ws, o=offsets: grouped.grouped_matmul(xs[i], ws[i], o, p)}
            if fmt == "fp8_128x128" and t >= 4096:
                calls["codec"] = lambda i, xs=xs, ws=ws, o=offsets: grouped.grouped_matmul(
                    xs[i], ws[i], o, p, native=False
                )
            if peer and fmt == "fp8_128x128" and t >= 4096:
                out = torch.empty(t, n, device="cuda", dtype=torch.bfloat16)
                calls["deep_gemm"] = lambda i, xs=xs, ws=ws, o=out, e=ids: (
                    peer.m_grouped_fp8_gemm_nt_contiguous(
                        (xs[i].data, xs[i].scale.mT[: o.shape[0]]), (ws[i].data, ws[i].scale), o, e,
                        disable_ue8m0_cast=True,
                    ), o,
                )[1]  # fmt: skip
            first = row_error(_rows(xs[0], t // experts), ws[0][0])
            check = lambda name, y, first=first, rows=t // experts: first(y[:rows])  # noqa: E731
            yield Group(f"grouped {fmt} E={experts} {t}x{n}x{k}", sets, calls, check)


def _rows(x: BlockScaled, rows: int) -> BlockScaled:
    dense = replace(x, scale=x.scale[:, :rows].contiguous(), data=x.data[:rows], shape=(rows, x.shape[1]))
    return replace(dense, layout="col_scales")


def quantize_groups(quick: bool) -> Iterator[Group]:
    """Group quantization against a copy of the same input, and one row against an empty kernel."""
    p, fmt, ue = detect("cuda"), get_format("fp8_1x128"), get_format("fp8_1x128_ue8m0")
    for m, k in ((8192, 7168), (1, 7168), (8192, 2048))[: 2 if quick else 3]:
        sets = 3 if m > 1 else 8
        xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
        out = torch.empty_like(xs[0])
        wide = [torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
        weight = torch.rand(k, device="cuda", dtype=torch.bfloat16)
        ticket = torch.zeros(1, device="cuda", dtype=torch.int32)
        yield Group(f"quantize {m}x{k}", sets, {
            "row": lambda i, xs=xs: q.quantize(xs[i], fmt, p),
            "tma": lambda i, xs=xs: q.quantize(xs[i], fmt, p, layout="tma"),
            "ue8m0x4": lambda i, xs=xs: q.quantize(xs[i], ue, p, layout="ue8m0x4"),
            "codec": lambda i, xs=xs: q.quantize(xs[i], fmt, capability.without_fp8(p), layout="tma"),
            "swiglu": lambda i, w=wide: q.swiglu_quantize(w[i], fmt, p, layout="tma"),
            "rmsnorm": lambda i, xs=xs, w=weight: q.rmsnorm_quantize(xs[i], w, 1e-6, fmt, p, layout="tma"),
            "copy": lambda i, xs=xs, o=out: o.copy_(xs[i]),
            "empty": lambda i, t=ticket: empty_kernel[(1,)](t),
        })  # fmt: skip


SECTIONS: dict[str, Callable[[bool], Iterator[Group]]] = {
    "quantize": quantize_groups, "gemm": gemm_groups, "grouped": grouped_groups,
    "middle": lambda quick: gemm_groups(quick, (64, 128, 256, 512)),
}  # fmt: skip
