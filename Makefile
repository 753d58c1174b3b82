# Every target sets up what it needs; the venv is rebuilt when its pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test check bench docs conformance clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python bench/demo.py

test: setup
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py tests/test_exports.py

conformance: setup
	$(BIN)/blockscale conformance --device cpu

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
