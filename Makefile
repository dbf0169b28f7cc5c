# make quickstart   install, then train a small LLaMA with FPDT on real text
# make test         everything CI runs
# make help         the rest

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
OUT ?= quickstart_out
TEST_WORKERS ?= 3
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest
MEGATRON_CORE_PYTHON ?= .venv-megatron-core/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
SCRIPTS := $(wildcard tools/*.sh examples_deepspeed/*/*.sh .ci/run)

.PHONY: help quickstart venv venv-dev test test-gpu test-slow test-megatron-core kill-test grid lint format clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 28

quickstart: $(INSTALLED)  ## Install, then train a small LLaMA with FPDT on real text (OUT=folder)
	VENV="$(abspath $(VENV))" OUT="$(OUT)" tools/quickstart.sh

venv: $(INSTALLED)  ## Create .venv with all that training, TensorBoard and plots need (PYTHON=python3.12)

venv-dev: $(INSTALLED_DEV)  ## The same, plus the development tools

# In the order of their names the files that take longest come first; xdist would begin with the ones of most tests.
test: lint  ## Lint and run the tests that need no GPU
	$(PYTEST) -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slow and not grid"

test-gpu: $(INSTALLED_DEV)  ## Run the tests that need a GPU
	$(PYTEST) -m gpu

test-slow: $(INSTALLED_DEV)  ## Run the tests that take minutes
	$(PYTEST) -m "slow and not gpu"

test-megatron-core: $(MEGATRON_CORE_PYTHON)  ## Exchange datasets with PyPI's megatron-core
	MEGATRON_CORE_PYTHON="$(abspath $(MEGATRON_CORE_PYTHON))" $(PYTEST) -m slow tests/integration/test_megatron_core.py

kill-test: $(INSTALLED_DEV)  ## Kill 50 runs at random moments and compare the resumed runs
	$(PYTEST) -rP tests/integration/test_kills.py

grid: $(INSTALLED_DEV)  ## Run the whole exactness grid
	$(PYTEST) -m grid

lint: $(INSTALLED_DEV)  ## Check style, types, shell scripts and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SCRIPTS)
	$(BIN)/hadolint Dockerfile

format: $(INSTALLED_DEV)  ## Fix style and format the source
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove caches and builds; .venv and quickstart_out stay
	rm -rf build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache
	find megatron tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: $(PYTHON) is $$({ $(PYTHON) -V || echo missing; } 2>/dev/null), and 3.11 or newer is needed;" \
	       "name another one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without an NVIDIA GPU, install the CPU build of torch first, which avoids gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml setup.py $(wildcard megatron/data/*.cpp) | $(BIN)/python
	@if ! command -v nvidia-smi >/dev/null; then \
	  echo "no nvidia-smi: installing the CPU build of torch $(TORCH_VERSION)"; \
	  $(PIP) --quiet --retries 1 --no-deps --extra-index-url $(TORCH_CPU_INDEX) torch==$(TORCH_VERSION); \
	fi
	@echo "installing into $(VENV); this takes a minute or two"
	$(PIP) --quiet --editable '.[plots,tensorboard]'
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) --quiet --editable '.[dev]'
	touch $@

# megatron-core is also a package named megatron, so it gets its own environment. torch and numpy come from $(VENV).
.venv-megatron-core/bin/python: | $(INSTALLED_DEV)
	$(BIN)/python -m venv $(@D)/..
	$@ -m pip install --disable-pip-version-check --quiet --no-deps megatron-core
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_the_other_environment.pth"
