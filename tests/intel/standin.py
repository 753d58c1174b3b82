"""CPU implementations of vllm-xpu-kernels' ops that behave like the real ones, guesses and gaps included.

Registered under the real names and schemas, so that our adapters run end to end without an XPU. Memory is read and
written as the real kernels do it: through raw pointers, which ignore whatever strides the op does not look at. Where
a real kernel would read past the end of a buffer, GARBAGE is read here. Behaviour as read from the package's sources
(csrc/quantization, csrc/xpu/onednn) and its Python callers, wheel 0.1.16.2.
"""

import json
from pathlib import Path

import torch

import blockscale.kernels.xpu as package

RECORD = json.loads((Path(package.__file__).parent / "schemas.json").read_text())
MAX, FLOOR, GARBAGE = 448.0, 1 / (448.0 * 512.0), 977.0
FP8 = torch.float8_e4m3fn


def need(condition, text):
    if not condition:
        raise RuntimeError(text)


def raw(t, *shape):
    """The memory from t's first element on as a contiguous tensor; GARBAGE behind its end."""
    size = int(torch.Size(shape).numel())
    flat = t.as_strided((min(size, t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()),), (1,))
    if flat.numel() < size:
        flat = torch.cat([flat.float(), torch.full((size - flat.numel(),), GARBAGE)])
    return flat.reshape(shape)


def cast(y, inverse):
    """ConvertWithScaleOp: multiply by 1/s and clamp with C's fmin and fmax, which drop a NaN."""
    return torch.fmax(torch.tensor(-MAX), torch.fmin(y * inverse, torch.tensor(MAX))).to(FP8)


def scale_of(y, dims, ue8m0=False):
    amax = torch.where(y.isnan(), 0.0, y.abs()).amax(dims)
    scale = (amax / MAX).clamp(min=FLOOR)
    return torch.exp2(torch.ceil(torch.log2(scale))) if ue8m0 else scale


def group_quant(x, q, s, group, eps, low, high, ue8m0, transposed, tma):
    need(x.is_contiguous() and q.is_contiguous(), "input and output must be contiguous")
    need(s.dtype == torch.float32 and s.dim() == 2, "scales must be fp32 and 2-D")
    need(x.numel() % group == 0, "input must be whole groups")
    y = x.float().reshape(-1, group)
    scale = scale_of(y, 1, ue8m0)
    q.copy_(cast(y, (1 / scale)[:, None]).view(torch.uint8).view(q.shape).view(FP8))
    index = torch.arange(len(scale))
    if s.stride(0) < s.stride(1):
        index = index % s.size(1) * s.stride(1) + index // s.size(1)
    s.as_strided((int(index.max()) + 1,), (1,))[index] = scale


def static_quant(q, x, scale, group_shape=None):
    need(x.stride(-1) == 1 and q.stride(-1) == 1, "last dimension must be contiguous")
    rows, cols = x.shape
    if scale.numel() == 1:
        grid = scale.reshape(1, 1)
    else:
        need(scale.dim() == 2, "1D scale requires explicit group_shape")
        need(rows % scale.size(0) == 0 and cols % scale.size(1) == 0, "scale dims must divide the input's")
        grid = scale
    full = grid.repeat_interleave(rows // grid.size(0), 0).repeat_interleave(cols // grid.size(1), 1)
    q.copy_(cast(x.float(), 1 / full))


def row_quant(q, x, scale, upper=None):
    rows, cols = x.shape
    y = raw(x, rows, cols).float()
    s = scale_of(y, 1)
    q.copy_(cast(y, (1 / s)[:, None]))
    scale.as_strided((rows,), (1,)).copy_(s)


def silu_quant(q, x, scales, group, upper=None, transposed=False, ue8m0=False):
    need(x.dtype in (torch.float16, torch.bfloat16), "input must be float16 or bfloat16")
    need(x.is_contiguous() and q.is_contiguous() and scales.dtype == torch.float32, "must be contiguous, fp32 scales")
    need(group in (32, 64, 128) and q.size(1) % group == 0, "group_size must be 32, 64 or 128 and divide")
    rows, groups = x.size(0), q.size(1) // group
    need(tuple(scales.shape) == (rows, groups), "scales must have logical shape [num_tokens, num_groups]")
    gate, up = x.float().chunk(2, 1)
    y = (gate / (1 + torch.exp(-gate)) * up).view(rows, groups, group)
    s = scale_of(y, 2, ue8m0)
    q.copy_(torch.fmax(torch.tensor(-MAX), torch.fmin(y / s[..., None], torch.tensor(MAX))).view(rows, -1).to(FP8))
    strides = (1, rows) if transposed else (groups, 1)  # the flag decides; the tensor's strides are not looked at
    scales.as_strided((rows, groups), strides).copy_(s)


def spread(scale, k, n):
    """[gk, gn] scales over [k, n]."""
    return scale.repeat_interleave(k // scale.size(0), 0).repeat_interleave(n // scale.size(1), 1)


def product(a, b, bias, dtype):
    y = a.double() @ b.double()
    return (y if bias is None else y + bias.double()).to(dtype)


def fp8_gemm(a, b, dtype, a_scale, b_scale, bias):
    need(dtype in (torch.float16, torch.bfloat16), f"out {dtype}")
    need(a.dtype == FP8 and b.dtype == FP8, "fp8 operands")
    (m, k), n = a.shape, b.size(1)
    if a_scale.dim() == 2 and a_scale.size(1) > 1:  # "blocks"
        need(a_scale.size(1) == b_scale.size(0), "Mismatch group size in input and weight.")
        need(k % b_scale.size(0) == 0 and n % b_scale.size(1) == 0, "Weight block scale dims must divide [K, N]")
        x = raw(a, m, k).float() * raw(a_scale, *a_scale.shape).float().repeat_interleave(k // a_scale.size(1), 1)
        w = b.float() * spread(raw(b_scale, *b_scale.shape).float(), k, n)
    else:
        x = raw(a, m, k).float() * (a_scale if a_scale.numel() == 1 else raw(a_scale, m, 1).float())
        w = b.float() * (b_scale if b_scale.numel() == 1 else raw(b_scale, 1, n).float())
    return product(x, w, bias, dtype)


def fp8_bmm(a, b, dtype, a_scale, b_scale, bias):
    experts, m, k, n = *a.shape, b.size(2)
    need(tuple(a_scale.shape[:2]) == (experts, m) and k % a_scale.size(2) == 0, "src grouped scale")
    need(b_scale.size(0) == experts and k % b_scale.size(1) == 0 and n % b_scale.size(2) == 0, "weight block scale")
    x = raw(a, experts, m, k).float() * raw(a_scale, *a_scale.shape).repeat_interleave(k // a_scale.size(2), 2)
    scales = torch.stack([spread(s, k, n) for s in raw(b_scale, *b_scale.shape)])
    return product(x, b.float() * scales, bias, dtype)


def fp8_gemm_w8a16(a, b, scale, bias):
    need(a.dtype in (torch.float16, torch.bfloat16) and a.stride(1) == 1, f"a {a.dtype}")
    k, n = b.shape
    if scale.dim() == 2 and scale.size(0) > 1:
        need(k % scale.size(0) == 0 and n % scale.size(1) == 0, "Weight block scale dims must divide [K, N]")
        group = k // scale.size(0)  # the same for both sides
        wide = raw(scale, k // group, -(-n // group)).float()
        w = b.float() * wide.repeat_interleave(group, 0).repeat_interleave(group, 1)[:, :n]
    else:
        w = b.float() * (scale if scale.numel() == 1 else raw(scale, 1, n).float())
    return product(a, w, bias, a.dtype)


def decoded_fp4(packed, scale):
    """[..., N, K / 2] nibbles, low first, times [..., N, K / 32] E8M0 bytes."""
    byte = packed.view(torch.uint8)
    code = torch.stack([byte & 15, byte >> 4], -1).flatten(-2).long()
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    value = grid[code & 7] * torch.where(code >= 8, -1.0, 1.0)
    return value * torch.exp2(scale.view(torch.uint8).float() - 127).repeat_interleave(32, -1)


def fp4_gemm(a, b, a_scale, b_scale, dtype, bias):
    need(a.dtype == b.dtype == torch.float4_e2m1fn_x2, "fp4 operands")
    x = decoded_fp4(a, a_scale)
    w = decoded_fp4(b.view(torch.uint8).mT.contiguous(), b_scale)
    return product(x, w.mT, bias, dtype)


def grouped_gemm(a, a_scale, b, b_scale, bias, out, rows, n, k, experts):
    need(a_scale is None, "ptr_A_scale is for Xe3P")
    need(a.dtype in (torch.float16, torch.bfloat16) and a.is_contiguous() and b.is_contiguous(), "contiguous 16 bit")
    need(rows.dtype == torch.int32 and tuple(rows.shape) == (experts,), "rows_per_expert int32 [E]")
    start = 0
    for e, count in enumerate(rows.tolist()):
        if b.dtype == torch.float4_e2m1fn_x2:
            need(tuple(b.shape) == (experts, n, k // 2) and b_scale.dtype == torch.uint8, "mxfp4 [E, N, K / 2]")
            w = decoded_fp4(b[e], b_scale[e]).mT
        else:
            need(tuple(b.shape) == (experts, k, n), "fp8 [E, K, N]")
            need(b_scale.dtype == torch.float32 and b_scale.dim() == 3, "block scales fp32 [E, K / 128, N / 128]")
            need(k % 128 == 0 and n % 128 == 0, "whole blocks")
            w = b[e].float() * spread(b_scale[e], k, n)
        out[start : start + count] = product(a[start : start + count], w, None, a.dtype)
        start += count
    return out


IMPLEMENTATIONS = {
    "_C::per_token_group_fp8_quant": group_quant,
    "_C::static_scaled_fp8_quant": static_quant,
    "_C::dynamic_per_token_scaled_fp8_quant": row_quant,
    "_C::silu_and_mul_per_block_quant": silu_quant,
    "_xpu_C::fp8_gemm": fp8_gemm,
    "_xpu_C::fp8_bmm": fp8_bmm,
    "_xpu_C::fp8_gemm_w8a16": fp8_gemm_w8a16,
    "_xpu_C::fp4_gemm": fp4_gemm,
    "_xpu_C::cutlass_grouped_gemm_interface": grouped_gemm,
}
_libraries = {}


def install():
    """Register the ops, once a process."""
    if _libraries:
        return
    for name, function in IMPLEMENTATIONS.items():
        namespace, op = name.split("::")
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
        library.define(RECORD["schemas"][name].split("::", 1)[1])
        library.impl(op, function, "CPU")


def install_fakes():
    """Shapes of the ops for fake tensors, on whatever device they are."""
    quiet = [op for op in IMPLEMENTATIONS if op.startswith("_C::")]
    fakes = {op: lambda *args, **kwargs: None for op in quiet}
    fakes["_xpu_C::fp8_gemm"] = lambda a, b, dtype, *rest: same_device(a, b, *rest).new_empty(
        a.shape[0], b.shape[1], dtype=dtype
    )
    fakes["_xpu_C::fp8_bmm"] = lambda a, b, dtype, *rest: same_device(a, b, *rest).new_empty(
        *a.shape[:2], b.shape[2], dtype=dtype
    )
    fakes["_xpu_C::fp8_gemm_w8a16"] = lambda a, b, *rest: same_device(a, b, *rest).new_empty(a.shape[0], b.shape[1])
    fakes["_xpu_C::cutlass_grouped_gemm_interface"] = lambda a, scale, b, *rest: same_device(a, b, *rest).new_empty(0)
    for op, fake in fakes.items():
        torch.library.register_fake(op, fake, lib=_libraries[op.split("::")[0]])


def same_device(*operands):
    devices = {t.device for t in operands if isinstance(t, torch.Tensor)}
    need(len(devices) == 1, f"operands on {devices}")
    return operands[0]
