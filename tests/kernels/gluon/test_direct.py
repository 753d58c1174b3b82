"""Prepared launches pass what the compiled kernel expects: parameter by parameter, with a driver that only listens."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")
sys.path.insert(0, str(Path(__file__).parent))

from aot import compile_for_hopper
from blockscale.kernels.gluon import direct, quantize, swap, wide
from blockscale.kernels.gluon.config import parse
from blockscale.kernels.gluon.launch import Launch


class Driver:
    def __init__(self) -> None:
        self.started: list[object] = []

    def cuTensorMapEncodeTiled(self, *args: object) -> int:
        return 0

    def cuTensorMapReplaceAddress(self, *args: object) -> int:
        return 0

    def cuLaunchKernelEx(self, *args: object) -> int:
        self.started.append(args)
        return 0


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor | None, ...]:
    x, w = (torch.zeros(rows, k, dtype=torch.float8_e4m3fn) for rows in (m, n))
    scales = torch.ones(-(-k // 128), -(-m // 4) * 4), torch.ones(-(-n // 128), -(-k // 128))
    return x, scales[0], w, scales[1], None, torch.empty(m, n, dtype=torch.bfloat16)


def launches() -> dict[str, Launch]:
    data, scale = torch.empty(5, 320, dtype=torch.float8_e4m3fn), torch.empty(3, 8)
    x = torch.zeros(5, 320, dtype=torch.bfloat16)
    return {
        "swap": swap.launch(*operands(16, 576, 1024), parse("swap-16-g1-k2-x1-s2"), 132),
        "wide": wide.launch(*operands(130, 576, 1024), parse("wide-64o-u4-p2-g1-s2-x1-y64"), 132),
        "quantize": quantize.launch(x, data, scale, True, 1e-10),
    }


@pytest.mark.parametrize("name", ["swap", "wide", "quantize"])
def test_a_prepared_launch_has_the_kernels_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(direct, "_driver", lambda: driver)
    launch = launches()[name]
    compiled = compile_for_hopper(launch)
    declared = re.findall(r"\.param (\.align \d+ )?\.(\w+) .*?_param_\d+(\[128\])?", compiled.asm["ptx"].split(")")[0])
    meta = compiled.metadata
    loaded = SimpleNamespace(
        metadata=meta, src=compiled.src, function=1, packed_metadata=(meta.num_warps, meta.num_ctas, meta.shared)
    )
    prepared = direct.Direct(launch, loaded, stream=7)
    assert len(prepared._parameters) == len(declared)
    assert len(prepared.maps) == sum(bool(size) for *_, size in declared)
    assert all((tensor_map.at.value or 1) % 64 == 0 for tensor_map in prepared.maps.values())
    assert prepared.enqueue() == 0
    assert len(driver.started) == 1


def test_a_refused_launch_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_driver", lambda: SimpleNamespace(cuGetErrorString=lambda code, text: 0))
    direct.check_launch(0)
    with pytest.raises(direct.BlockscaleError, match="cuLaunchKernelEx: CUDA error 700"):
        direct.check_launch(700)
