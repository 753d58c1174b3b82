"""Imports only go down, and only platform.py asks about hardware: the architecture, checked from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "blockscale"
FLOOR = {
    "errors": 0, "version": 0, "package_ops": 0, "interrupt": 0,
    "formats": 1, "environment": 1, "observe": 1, "verdicts": 1,
    "tensor": 2, "numerics": 2, "platform": 2, "policy": 3, "checks": 3,
    "layouts": 3, "contract": 3, "reference": 4, "fakes": 4,
    "registry": 5, "tuning": 5, "routed": 5,
    "kernels": 6,
    "library": 7, "shortcut": 8, "gradients": 9, "ops": 10,
    "nn": 11, "checkpoint": 11,
    "parallel": 12, "conformance": 12, "integrations": 13,
    "cli": 14, "__init__": 15, "__main__": 15,
}  # fmt: skip
HARDWARE = (
    "is_available(",
    "get_device_capability",
    "get_device_properties",
    "version.hip",
    "find_spec",
    "/proc/cpuinfo",
)
ASKS = ("platform.py", "environment.py")
"""What chooses kernels, and what only reports."""
SOURCES = sorted(ROOT.rglob("*.py"))


def targets(path: Path) -> list[tuple[int, str]]:
    """(line, top-level module) of every import of our own package."""
    depth = len(path.relative_to(ROOT).parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.lineno, name.split(".")[0]) for name in names if name]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "blockscale":
            found.append((node.lineno, [*node.module.split("."), "__init__"][1]))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path):
    me = path.relative_to(ROOT).parts[0].removesuffix(".py")
    discovery = ("registry", "kernels")  # by package path only: the registry never names a kernel
    wrong = [
        f"{path.name}:{line} {me} (floor {FLOOR[me]}) imports {other} (floor {FLOOR[other]})"
        for line, other in targets(path)
        if other != me and (me, other) != discovery and FLOOR[other] >= FLOOR[me]
    ]
    assert wrong == []


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name not in ASKS], ids=lambda p: str(p.relative_to(ROOT)))
def test_only_platform_asks_about_hardware(path):
    text = path.read_text()
    assert [word for word in HARDWARE if word in text] == []


def test_the_check_sees_an_upward_import(tmp_path):
    tree = ast.parse("from ..registry import x")
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom))
    assert node.level == 2
    assert FLOOR["registry"] >= FLOOR["layouts"]


def test_no_source_file_names_a_device_it_was_not_given():
    """Nothing outside the kernels for it may hard-code 'cuda' as a device."""
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] in ("platform.py", "kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "device" and isinstance(node.value, ast.Constant):
                assert node.value.value in ("cpu", "meta", None), f"{path}:{node.value.lineno}"
