# Every target sets up what it needs; the venv is rebuilt when its pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test test-slow check bench docs aot conformance clean test-xpu test-vllm

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/blockscale/kernels/cpu/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt setuptools
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python bench/demo.py

test: setup
	$(BIN)/python -m pytest -q -n 2

# Our Triton kernels through Intel's compiler, run on this CPU: its own venv, and ocloc from Debian (docs/xpu.md).
test-xpu: setup
	$(BIN)/python tests/xpu/run.py

# Scale-out under torchrun, every pair of encodings, a full disk, model agreement, AOTInductor.
test-slow: setup
	$(BIN)/python -m pytest -q -n 2 -m slow

# The plugin on the real vLLM, in a venv of its own: downloads gigabytes, so CI runs tests/integrations against its contract.
test-vllm: setup
	$(BIN)/python tests/vllm/run.py

check: setup
	$(BIN)/ruff check src tests bench docs examples
	$(BIN)/ruff format --check src tests bench docs examples
	$(BIN)/mypy
	$(BIN)/python docs/make.py --check
	$(BIN)/python -m pytest -q tests/test_floors.py tests/test_exports.py

bench: setup
	$(BIN)/python bench/cpu.py

docs: setup
	$(BIN)/python docs/make.py

aot: setup
	$(BIN)/python bench/aot.py --out build/aot.json

conformance: setup
	$(BIN)/blockscale conformance --device cpu

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
