"""Peers of the FP8 block-scaled GEMM, all optional: each binds operands once and then only launches."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from blockscale import reference
from blockscale.layouts import scale_view
from blockscale.tensor import BlockScaled

Run = Callable[[], Tensor | None]


class Peer:
    """bind: from packed operands to a call without arguments; the call writes y or returns the result."""

    name = ""

    def available(self, folder: str) -> bool:
        return True

    def serves(self, m: int, n: int, k: int) -> bool:
        return True

    def bind(self, x: BlockScaled, w: BlockScaled, y: Tensor) -> Run:
        raise NotImplementedError


class Bf16(Peer):
    """torch.mm on bf16 operands: what a checkpoint costs that is dequantized at load."""

    name = "bf16"

    def bind(self, x: BlockScaled, w: BlockScaled, y: Tensor) -> Run:
        a, b = reference.dequantize(x, torch.bfloat16), reference.dequantize(w, torch.bfloat16).mT

        def run() -> None:
            torch.mm(a, b, out=y)

        return run


class CublasLt(Peer):
    """cuBLASLt's block scaling through torch.nn.functional.scaled_mm. M is padded to a multiple of 4 when bound."""

    name = "cublaslt"

    def serves(self, m: int, n: int, k: int) -> bool:
        return k % 512 == 0

    def bind(self, x: BlockScaled, w: BlockScaled, y: Tensor) -> Run:
        from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

        m, k = x.shape
        rows = -(-m // 4) * 4
        data = x.data
        if rows != m:
            data = torch.zeros(rows, k, device=x.device, dtype=torch.uint8)
            data[:m] = x.data.view(torch.uint8)
            data = data.view(x.data.dtype)
        x_scale = x.scale.mT  # [round_up(m, 4), k / 128] with strides (1, rows)
        w_scale = w.scale.mT

        def run() -> Tensor:
            out = scaled_mm(data, w.data.mT, x_scale, ScalingType.BlockWise1x128, w_scale,
                            ScalingType.BlockWise128x128, SwizzleType.NO_SWIZZLE, SwizzleType.NO_SWIZZLE,
                            output_dtype=y.dtype)  # fmt: skip
            return out[:m]

        return run


class DeepGemm(Peer):
    """DeepGEMM's fp8_gemm_nt. pdl: with its own programmatic dependent launch switched on."""

    def __init__(self, name: str, pdl: bool) -> None:
        self.name = name
        self.pdl = pdl

    def available(self, folder: str) -> bool:
        archive = pathlib.Path(folder) / "deep_gemm.tar.xz"
        home = pathlib.Path(tempfile.gettempdir()) / "blockscale-peers"
        if archive.exists() and not (home / "ready").exists():
            home.mkdir(exist_ok=True)
            with tarfile.open(archive) as tar:
                tar.extractall(home, filter="data")
            (home / "ready").touch()
        if (home / "ready").exists() and str(home) not in sys.path:
            sys.path.insert(0, str(home))
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        os.environ.setdefault("CUDA_HOME", str(pathlib.Path(nvcc).resolve().parent.parent))
        os.environ.setdefault("DG_JIT_CACHE_DIR", str(home / "cache"))
        try:
            import deep_gemm
        except Exception as e:  # a broken install is as absent as none
            print(f"{self.name}: {type(e).__name__} {str(e)[:300]}", flush=True)
            return False
        return not self.pdl or hasattr(deep_gemm, "set_pdl")

    def bind(self, x: BlockScaled, w: BlockScaled, y: Tensor) -> Run:
        import deep_gemm

        a, b = (x.data, scale_view(x)), (w.data, w.scale)

        def run() -> None:
            if hasattr(deep_gemm, "set_pdl"):
                deep_gemm.set_pdl(self.pdl)
            deep_gemm.fp8_gemm_nt(a, b, y, disable_ue8m0_cast=True)

        return run


class Prototype(Peer):
    """An earlier version of our kernels, where auto.py lies in the peers' folder: did a rewrite lose speed?"""

    name = "prototype"

    def available(self, folder: str) -> bool:
        if not (pathlib.Path(folder) / "auto.py").exists():
            return False
        sys.path.insert(0, str(pathlib.Path(folder).resolve()))
        return True

    def bind(self, x: BlockScaled, w: BlockScaled, y: Tensor) -> Run:
        import auto

        x_scale = scale_view(x)

        def run() -> None:
            auto.gemm(x.data, x_scale, w.data, w.scale, y)

        return run


PEERS: list[Peer] = [Bf16(), CublasLt(), DeepGemm("deepgemm", False), DeepGemm("deepgemm_pdl", True), Prototype()]
