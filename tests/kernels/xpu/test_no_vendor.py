"""Nothing in the package is tied to a vendor's device, its streams, or a dtype that some chips lack.

A search of the syntax tree; `test_fake_device.py` and `test_fake_models.py` show the same by running.
"""

import ast
import re
from pathlib import Path

import pytest

import blockscale

ROOT = Path(blockscale.__file__).parent
VENDOR = {"cuda", "xpu", "hip"}
DEVICE = re.compile(r"(cuda|xpu|hip)(:\d*)?")
STREAMS = {"Stream", "current_stream", "default_stream", "ExternalStream", "set_stream"}
GLOBAL = {"set_default_dtype", "set_default_device", "set_default_tensor_type"}
ASKS_A_PLATFORM = {"at_least", "value", "has"}
ONE_VENDOR = {
    ("kernels", "gluon"), ("kernels", "deep_gemm"), ("kernels", "aiter"), ("cli", "tune.py"), ("parallel", "memory.py"),
}  # fmt: skip
"""Kernels for one vendor's chips, which refuse every other kind, the command that tunes them, memory over NVLink."""
ON_DEVICE = ("kernels", "nn")
DEVICE_MODULES = {"ops.py", "library.py", "layouts.py", "gradients.py"}
"""What runs on the accelerator. Arc A has no fp64: the definition computes in it on a CPU, kernels must not."""


def found(text):
    """Lines that name a vendor's device or stream, or change what tensors are made of for the whole process."""
    lines = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            whose = node.value.id if isinstance(node.value, ast.Name) else ""
            if (whose == "torch" and node.attr in VENDOR) or node.attr in STREAMS | GLOBAL:
                lines.add(node.lineno)
        held = []
        if isinstance(node, ast.Call):
            asks = isinstance(node.func, ast.Attribute) and node.func.attr in ASKS_A_PLATFORM
            held = [] if asks else [*node.args, *(k.value for k in node.keywords)]
        elif isinstance(node, ast.arguments):
            held = [*node.defaults, *node.kw_defaults]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.Return):
            held = [node.value]
        elif isinstance(node, ast.JoinedStr):
            held = node.values[:1]
        for value in held:
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and DEVICE.fullmatch(value.value):
                lines.add(value.lineno)
    return sorted(lines)


def fp64(text):
    """Lines that compute in fp64."""
    return sorted(
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and node.attr in {"float64", "double"}
    )


def sources():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts != ("platform.py",) and parts[:2] not in ONE_VENDOR:
            yield path, parts


def test_no_code_of_ours_names_a_vendor_s_device_or_stream():
    assert {str(path): lines for path, _ in sources() if (lines := found(path.read_text()))} == {}


def test_nothing_on_the_device_computes_in_fp64():
    on_device = [p for p, parts in sources() if parts[0] in ON_DEVICE or parts[-1] in DEVICE_MODULES]
    assert len(on_device) > 30
    assert {str(p): lines for p in on_device if (lines := fp64(p.read_text()))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "torch.cuda.current_stream()", "x.to('cuda')", "torch.empty(3, device='xpu:0')", "torch.device('cuda:1')",
        "def f(x, device='cuda'): pass", "def f(x, *, device='cuda'): pass", "DEVICE = 'xpu'", "d: str = 'cuda:0'",
        "f(f'cuda:{rank}')", "torch.accelerator.current_stream()", "torch.set_default_dtype(d)", "torch.Stream()",
    ],
)  # fmt: skip
def test_the_search_finds_them(text):
    assert found(text) == [1]


@pytest.mark.parametrize("text", ["p.kind == 'cuda'", "p.kind in ('cuda', 'xpu')", "T = {('xpu', '*'): 1}",
                                  "p.value('cuda')", "KINDS = ('cuda', 'xpu')"])  # fmt: skip
def test_the_search_lets_questions_and_tables_be(text):
    assert found(text) == []
