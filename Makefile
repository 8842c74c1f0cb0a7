# Everything that people and CI run is a target here. `make` alone lists them.

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

BENCHMARKS = $(sort $(wildcard benchmarks/[a-z]*.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo fmt check test test-fast test-all bench docs build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make .venv with torch, the package and the development tools (PYTHON=... picks the interpreter)

# torch comes first and alone, so that nothing below can pull another build of it.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed; name another: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
		echo "make: ParaBlock needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; \
		echo "      Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) -V) (once; torch is the largest part)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
	@$(PIP) "$(TORCH)" --editable ".[dev]"
	@touch $@
	@echo "$(VENV) is ready"

demo: $(STAMP)  ## fine-tune a small model over several clients and say what happened (under five minutes)
	$(BIN)/parablock demo

fmt: $(STAMP)  ## format the code and apply the safe fixes of the linter
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(STAMP)  ## formatter, linter, types, direction of the imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest

test-fast: $(STAMP)  ## the tests that are not marked slow
	$(BIN)/python -m pytest -m "not slow"

test-all: check test  ## what CI runs: check and test

bench: $(STAMP)  ## run every benchmark; each says where it writes its JSON
	@test -n "$(BENCHMARKS)" || { echo "make: there are no benchmarks in benchmarks/" >&2; exit 1; }
	@for file in $(BENCHMARKS); do echo "$$file"; $(BIN)/python "$$file" || exit 1; done

docs: $(STAMP)  ## check that links, commands and targets named in the Markdown pages exist
	$(BIN)/python -m pytest --quiet tests/repo/test_project.py

build: $(STAMP)  ## source archive and wheel in dist/
	$(BIN)/python -m build --outdir dist .

clean:  ## remove caches and build output (.venv and runs/ stay)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
