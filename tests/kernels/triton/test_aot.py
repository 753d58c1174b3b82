"""Compile a few launches for chips that are not here: `make aot` compiles all of them."""

import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from blockscale.formats import get_format
from blockscale.kernels.triton import gemm, quantize
from blockscale.numerics import get_numerics

BENCH = Path(__file__).parents[3] / "bench"
sys.path.append(str(BENCH))  # aot.py takes in its neighbour
spec = importlib.util.spec_from_file_location("aot", BENCH / "aot.py")
aot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aot)


def compile_last(target, call):
    """Assembly of the last launch that `call` makes, and what the compiler spilled."""
    with aot.recorded() as launches:
        call(aot.platform_of(target))
    compiled = aot.compile_for(target, *launches[-1])
    return compiled.asm.get("ptx") or compiled.asm["amdgcn"], aot.spills(compiled, target)


def multiply(platform):
    """Twelve rows: up to eight take an instruction of sm_80 on Hopper, which multiplies fp16 there."""
    x, w = torch.empty(12, 256, dtype=torch.bfloat16), aot.weight("fp8_128x128", 64, 256, platform)
    gemm.linear(x, w, None, get_numerics("checkpoint"), torch.bfloat16, platform)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_multiplication_holds_the_native_instruction_exactly_where_there_is_one(target):
    text, spilled = compile_last(target, multiply)
    assert bool(re.search(aot.NATIVE.get(target, "no such instruction"), text)) == (target != "sm_80")
    assert spilled == 0
    if target == "sm_80":
        assert "e4m3" not in text
        assert "mma.sync" in text


def test_quantize_on_a_chip_without_fp8_types():
    call = lambda p: quantize.quantize(torch.empty(64, 256, dtype=torch.bfloat16), get_format("fp8_1x128"), p)  # noqa: E731
    text, spilled = compile_last("sm_75", call)
    assert "e4m3" not in text
    assert spilled == 0


FAULTS = [
    ({"native_instruction": None}, ["no native matrix instruction (wgmma\\.mma_async[\\w.]*e4m3\\.e4m3)"]),
    ({"spills": 40}, ["40 spilled"]),
    ({"seconds": 121.5}, ["121.5 s, over the limit of 120 s"]),
    ({"compiled": False, "error": "over the limit of 120 s"}, ["over the limit of 120 s"]),
    ({"kernel": "quantize"}, ["unexpected wgmma"]),
    ({}, []),
]


@pytest.mark.parametrize(("change", "want"), FAULTS)
def test_faults_of_a_row(change, want):
    row = {"target": "sm_90", "kernel": "grouped", "compiled": True, "native_instruction": "wgmma", "spills": 0}
    row["seconds"] = 3.0
    assert aot.faults({**row, **change}) == want


def test_the_documented_matrix_is_complete_and_faultless():
    rows = json.loads(aot.RECORD.read_text())
    assert [(r["target"], r["kernel"]) for r in rows] == list(itertools.product(aot.TARGETS, aot.CASES))
    assert len(rows) == 48
    assert [aot.faults(row) for row in rows] == [[]] * 48
    assert aot.differences(rows, rows) == []


def test_a_row_that_changed_is_named():
    rows = json.loads(aot.RECORD.read_text())
    other = [{**row, "seconds": 9.0, "native_instruction": None} for row in rows]
    named = {line.split()[1] for line in aot.differences(other, rows)}
    assert named == set(aot.NATIVE)
