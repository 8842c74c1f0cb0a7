# Everything that people and CI run is a target here. `make` alone lists them.

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
OLD_FLOWER := .venv-flower
OLDEST_FLOWER = $(shell sed -n 's/.*"flwr>=\([0-9.]*\),.*/\1/p' pyproject.toml)
# Two files of tests at a time: those that start processes mostly wait. The long ones come first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Tests start many processes: they find the package compiled.
unexport PYTHONDONTWRITEBYTECODE
# On a terminal pip shows what it loads, and its bars; in a log it says what goes wrong, and make names each step.
PIP := $(BIN)/python -m pip install $(shell test -t 2 || echo --quiet --quiet) --disable-pip-version-check

BENCHMARKS = $(sort $(wildcard benchmarks/[a-z]*.py))

.DEFAULT_GOAL := help
.PHONY: help setup browser proxies other-transformers demo fmt check test test-fast test-flower test-all bench bench-all docs lock build base clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make .venv: torch, the package, the tools (PYTHON=...)

# torch comes first and alone, so that nothing below can pull another build of it.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed; name another: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
		echo "make: ParaBlock needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; \
		echo "      Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) -V): once, about 3 minutes and 2.5 GB"
	@$(PYTHON) -m venv $(VENV)
	@echo "1 of 3: torch, the largest part"
	@$(PIP) "$(TORCH)"
	@echo "2 of 3: transformers, and what else a run needs"
	@$(PIP) "$(TORCH)" --editable .
	@echo "3 of 3: the tools of development: tests, types, pages, trackers"
	@$(PIP) "$(TORCH)" --editable ".[dev]"
	@touch $@
	@echo "$(VENV) is ready; for a shell in which \`parablock\` is a command: . $(VENV)/bin/activate"

browser:  ## install Chromium for tests of reports (apt, as root)
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "make: Chromium is missing; without it tests/integration/test_report.py is skipped." >&2; \
		echo "      Install it: sudo apt-get install chromium chromium-driver" >&2; exit 0; fi; \
	echo "Installing Chromium"; export DEBIAN_FRONTEND=noninteractive; \
	apt-get -qq -o Acquire::Retries=3 update && \
	apt-get -qq -o Acquire::Retries=3 -y --no-install-recommends install chromium chromium-driver >/dev/null

proxies:  ## install nginx and Caddy for tests (apt, as root)
	@if command -v nginx >/dev/null && command -v caddy >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "make: nginx or Caddy is missing; without them the tests of reverse proxies are skipped." >&2; \
		echo "      Install them: sudo apt-get install nginx-light caddy" >&2; exit 0; fi; \
	echo "Installing nginx and Caddy"; export DEBIAN_FRONTEND=noninteractive; \
	apt-get -qq -o Acquire::Retries=3 update && \
	apt-get -qq -o Acquire::Retries=3 -y --no-install-recommends install nginx-light caddy >/dev/null

# Exports are for others, most of whom have Transformers 4; it is read from a folder, beside the torch of .venv.
other-transformers: $(STAMP)  ## install Transformers 4 for the test of exports
	@test -d $(VENV)/other-transformers || $(PIP) --no-deps --target $(VENV)/other-transformers \
		"transformers==4.57.*" "tokenizers>=0.22,<0.23.1" "huggingface-hub>=0.34,<1.0"

demo: $(STAMP)  ## fine-tune a small model over clients (under 5 minutes)
	$(BIN)/parablock demo

fmt: $(STAMP)  ## format the code and apply the safe fixes of the linter
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(STAMP)  ## formatter, linter, types, direction of the imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --allow-subclassing-any examples/*.py
	$(BIN)/lint-imports
	@test ! -x $(BIN)/hadolint || $(BIN)/hadolint Dockerfile  # there is none for some machines

test: $(STAMP)  ## the whole test suite
	$(PYTEST)

test-fast: $(STAMP)  ## the tests that are not marked slow
	$(PYTEST) -m "not slow"

# Flower's oldest release that pyproject.toml allows, and everything else as in .venv.
$(OLD_FLOWER)/.ready: $(STAMP)
	@$(BIN)/python -m venv $(OLD_FLOWER)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(OLD_FLOWER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	@$(OLD_FLOWER)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps "flwr==$(OLDEST_FLOWER)"
	@touch $@

test-flower: $(OLD_FLOWER)/.ready  ## the tests of Flower, with the oldest release allowed
	PARABLOCK_FLOWER_PYTHON=$(OLD_FLOWER)/bin/python $(PYTEST) tests/integration/test_flower.py

test-all: check test test-flower  ## what CI runs: check, and all tests

# One seed of quality, and the benchmarks of step, wire, overlap, links and peers.
bench: $(STAMP)  ## the short benchmarks (under 15 minutes)
	$(BIN)/python benchmarks/speed.py step
	$(BIN)/python benchmarks/speed.py wire
	$(BIN)/python benchmarks/speed.py overlap
	$(BIN)/python benchmarks/speed.py slow_link
	$(BIN)/python benchmarks/speed.py scale
	$(BIN)/python benchmarks/quality.py peers
	$(BIN)/python benchmarks/quality.py formats --seeds 0 --no-table --output runs/formats-short.json
	$(BIN)/python benchmarks/quality.py quality --only t0 --seeds 0 --rounds 16 --task-examples 0 --output runs/quality-short.json

# Each says where it writes its JSON.
bench-all: $(STAMP)  ## every benchmark (many hours; some need root, extras)
	@for file in $(BENCHMARKS); do for name in $$($(BIN)/python "$$file" --names); do \
		echo "$$file $$name"; $(BIN)/python "$$file" "$$name" || exit 1; done; done

docs: $(STAMP)  ## build docs/_build/html, run what stands in the pages
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/sphinx-build -n -W -E --keep-going -q docs docs/_build/html
	$(BIN)/python -m pytest --quiet -m "not slow" tests/repo/test_project.py tests/repo/test_pages.py
	$(BIN)/python -m pytest --quiet tests/integration/test_pages.py
	@echo "open docs/_build/html/index.html"

# torch is not in it: it comes first, alone, and of the index of the machine (see setup).
lock: $(STAMP)  ## write requirements.lock: what is in .venv, with hashes
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' >build/installed.txt
	$(BIN)/uv pip compile --quiet --python $(BIN)/python --generate-hashes --no-header --no-annotate --extra dev \
		--constraint build/installed.txt --no-emit-package torch --output-file requirements.lock pyproject.toml

build: $(STAMP)  ## source archive, wheel and bill of materials, in dist/
	$(BIN)/python -m build --outdir dist .
	{ cat requirements.lock; echo "$(TORCH)"; } | $(BIN)/uv tool run --quiet --from cyclonedx-bom==7.5.0 \
		cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --output-file dist/parablock.cdx.json -

# `docker pull` asks the registry what the tag is today; what is built afterwards is built of that image and no other.
base:  ## pin the Dockerfile's base image by digest (docker)
	@tag=$$(sed -n 's/^ARG BASE=\([^@]*\).*/\1/p' Dockerfile) && docker pull --quiet "$$tag" >/dev/null && \
	digest=$$(docker image inspect --format '{{index .RepoDigests 0}}' "$$tag") && \
	sed -i "s|^ARG BASE=.*|ARG BASE=$$tag@$${digest#*@}|" Dockerfile && grep '^ARG BASE=' Dockerfile

clean:  ## remove caches and build output (.venv and runs/ stay)
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
