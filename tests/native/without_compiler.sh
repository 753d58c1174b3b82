#!/usr/bin/env bash
# An install on a machine without a C++ compiler succeeds, says what is lost, and computes through cpu.slices.
#
#   tests/native/without_compiler.sh [PYTHON]      a Python that has torch and setuptools; default .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "${1:-.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source"
cp -r setup.py pyproject.toml MANIFEST.in README.md LICENSE src "$work/source/"
find "$work/source" -name '*.so' -delete
cd "$work/source"
CC=/bin/false CXX=/bin/false "$python" setup.py -q bdist_wheel --dist-dir "$work" >"$work/log" 2>&1
grep -m1 "no working C++ compiler" "$work/log"
"$python" -m zipfile -e "$work"/*.whl "$work/installed"
test -z "$(find "$work/installed" -name '*.so')"
cd "$work"
PYTHONPATH="$work/installed" "$python" - <<'PYTHON'
import torch
import blockscale
from blockscale.registry import explain

assert "installed" in blockscale.__file__, blockscale.__file__
w = blockscale.quantize(torch.randn(192, 576), "fp8_128x128")
x = torch.randn(3, 576)
problem = blockscale.ops.linear_problem(w, x.dtype)
decisions = {d.kernel.name: d for d in explain(problem, blockscale.detect("cpu"))}
print("cpu.native:", *decisions["cpu.native"].reasons)
assert not decisions["cpu.native"].accepted and decisions["cpu.slices"].accepted
y, want = blockscale.linear(x, w), blockscale.linear(x, w, kernel="reference")
print("cpu.slices computes; worst difference from the reference:", (y - want).abs().max().item())
assert torch.allclose(y, want, rtol=1e-4, atol=1e-4)
PYTHON
