"""K steps of 32, which Intel's, Turing's and consumer Ampere's tiles have, beside scales of 64 elements.

A scale that is folded into an operand must lie whole inside a step: half a group has no scale of its own. Nothing is
launched here; `make test-xpu` runs such a multiplication.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from blockscale.formats import get_format
from blockscale.kernels.triton import gemm, grouped
from blockscale.numerics import get_numerics
from blockscale.platform import Platform

spec = importlib.util.spec_from_file_location("aot_compile", Path(__file__).parents[3] / "bench" / "aot_compile.py")
aot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aot)

CHIPS = (
    "cuda:sm_75", "cuda:sm_80", "cuda:sm_86", "cuda:sm_89", "cuda:sm_90", "cuda:sm_120", "rocm:gfx90a", "rocm:gfx942",
    "rocm:gfx1201", "xpu:pvc", "xpu:dg2",
)  # fmt: skip
FOLDED = [
    ("fp8_64x64_ue8m0", "weight_only"), ("fp8_1x64_ue8m0", "checkpoint"), ("fp8_64x64_ue8m0", "deepseek_v4_1"),
    ("mxfp8", "checkpoint"), ("mxfp4", "weight_only"), ("nvfp4", "checkpoint"),
]  # fmt: skip


def launched(chip, name, numerics, m, k, experts=0):
    """The constants of the multiplication that would run."""
    platform = Platform.parse(f"{chip}+triton=3.7.1")
    x, w = torch.empty(m, k, dtype=torch.bfloat16), aot.weight(name, 256, k, platform, experts)
    with aot.recorded() as launches:
        if experts:
            ends = torch.empty(experts, dtype=torch.int32)
            grouped.grouped_linear(x, w, ends, get_numerics(numerics), torch.bfloat16, platform)
        else:
            gemm.linear(x, w, None, get_numerics(numerics), torch.bfloat16, platform)
    return launches[-1]


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("chip", CHIPS)
def test_a_step_holds_whole_groups_of_folded_scales(chip, experts):
    """`folded_kernel` folds whatever it reads; `dense_kernel` reads a decoded weight, without scales."""
    seen = 0
    for name, numerics in FOLDED:
        for m, k in ((1, 2048), (200, 2048), (4096, 200)):
            if experts and get_format(name).two_level:
                continue  # activations of two levels have no grouped kernel
            kernel, _, constants = launched(chip, name, numerics, m, k, experts)
            for side in "XW" if kernel.__name__ in ("gemm_kernel", "grouped_kernel") else "W":
                how = {"folded_kernel": "fold", "dense_kernel": "none"}.get(kernel.__name__)
                if (how or constants[f"{side}_SCALE"]) == "fold":
                    assert constants["BK"] % constants[f"{side}_GROUP"] == 0, (name, numerics, m, k, constants)
                    seen += 1
    assert seen >= (3 if chip == "rocm:gfx942" else 6)  # its fp8 has another encoding: those scales stay in the loop


@pytest.mark.parametrize(("target", "name", "numerics"), [("sm_75", *FOLDED[0]), ("sm_86", *FOLDED[1])])
def test_groups_of_64_compile_where_steps_were_32(target, name, numerics):
    compiled = aot.compile_for(target, *launched(f"cuda:{target}", name, numerics, 200, 256))
    assert "mma" in compiled.asm["ptx"] or target == "sm_75"
    assert compiled.asm["cubin"]
