# The only spelling of each command; the README and CI call these.

PYTHON ?= python3
# A wheel without CUDA, where pip can find one; see "Installing" in the README.
TORCH_CPU ?= torch==2.13.0+cpu
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
CPP_FILES := $(shell find moe_bitnet kvcache cluster -name '*.cpp' -o -name '*.h' -o -name '*.inc')
SOURCES := $(CPP_FILES) CMakeLists.txt pyproject.toml

.DELETE_ON_ERROR:
.PHONY: help demo install test test-all check format clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 22

demo: $(VENV)/installed  ## install, then run the main job at a small size (about 10 minutes on 2 cores)
	$(BIN)/moe-bitnet demo $(ARGS)

install: $(VENV)/installed  ## create .venv and install the package

test: $(VENV)/installed-dev  ## run the fast tests
	$(BIN)/pytest $(ARGS)

test-all: $(VENV)/installed-dev  ## run all tests, slow ones too
	$(BIN)/pytest -m "slow or not slow" $(ARGS)

check: $(VENV)/installed-dev  ## lint, types, import contracts, C++ format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/installed-dev  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:  ## remove what was built and installed; runs/ stays
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is older. Set PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "error: $(PYTHON) has no venv. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without an NVIDIA driver, a torch built for the CPU alone saves 5 GB.
$(VENV)/torch: $(VENV)/bin/python
	@if command -v nvidia-smi >/dev/null 2>&1 || ! $(BIN)/pip install -q "$(TORCH_CPU)" 2>/dev/null; then \
		echo "installing $(TORCH) as pip finds it (with CUDA on Linux: about 6 GB)"; $(BIN)/pip install -q "$(TORCH)"; fi
	@touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	@echo "installing moe-bitnet and what it needs"
	$(BIN)/pip install -q -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@
