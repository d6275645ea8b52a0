# Everything runs in .venv, which `make setup` makes; every target below calls it first.
VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.statqat-installed

# Compiled once, here: with PYTHONDONTWRITEBYTECODE set (many containers set it) every process that
# a test starts would compile torch and Lightning anew, which takes ten times as long as the test.
INSTALL := $(BIN)/uv pip install --compile-bytecode

# The oldest supported versions, for `make test-lowest`.
LOWEST       := .venv-lowest
LOWEST_STAMP := $(LOWEST)/.statqat-installed

# The libraries whose modules `make test-public` trains.
PUBLIC       := .venv-public
PUBLIC_STAMP := $(PUBLIC)/.statqat-installed

# What `make docs` builds the documentation with.
DOCS       := .venv-docs
DOCS_STAMP := $(DOCS)/.statqat-installed

.DEFAULT_GOAL := help
.PHONY: help setup docs docs-serve demo test test-all test-lowest test-public lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install the package with everything its tests need

# A command of that name may exist and yet not start (pyenv shims) or lack ensurepip (Debian
# without python3-venv), so each candidate is asked rather than looked up. Set PYTHON to choose.
$(STAMP): pyproject.toml
	@if [ ! -x $(BIN)/python ]; then \
	  for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	      >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no Python 3.11 or newer with the venv module was found" \
	      "(tried python3.11, python3.12, python3.13, python3)." >&2; \
	    echo "Install one (Debian and Ubuntu: also python3-venv), or name it:" \
	      "make setup PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$found --version)"; \
	  $$found -m venv $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet uv
	$(INSTALL) --python $(BIN)/python torch torchvision --editable ".[dev,executorch]"
	@touch $@

demo: $(STAMP)  ## train, quantize and export a small network on scanned digits
	$(BIN)/python examples/digits.py

test: lint  ## linters, types and the quick tests
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not cifar and not slow"

test-all: lint  ## all tests, those that take long included
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-lowest: $(LOWEST_STAMP)  ## the quick tests on the oldest supported versions, in .venv-lowest
	$(LOWEST)/bin/python -m pytest --numprocesses auto --dist worksteal -m "not cifar and not slow"

# `lowest-direct` takes the lowest version that pyproject.toml allows of everything it names. Torch
# and torchvision are resolved together, as each release of one goes with one of the other. Without
# ExecuTorch, each release of which wants one of torchao.
$(LOWEST_STAMP): pyproject.toml | $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(INSTALL) --python $(LOWEST)/bin/python --resolution lowest-direct --editable ".[dev]"
	@touch $@

# In an environment of its own, which needs neither torch nor Lightning.
docs: $(DOCS_STAMP)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict

docs-serve: $(DOCS_STAMP)  ## show the documentation in a browser while it is written
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve

$(DOCS_STAMP): pyproject.toml | $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(DOCS)
	$(INSTALL) --python $(DOCS)/bin/python --group docs
	@touch $@

# With RECORD=1, the results become those that later runs are compared with.
test-public: $(PUBLIC_STAMP)  ## modules of public libraries, in .venv-public, against the record
	$(PUBLIC)/bin/python -m tests.public.table --again $(if $(RECORD),--record)

$(PUBLIC_STAMP): pyproject.toml tests/public/requirements.txt | $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(PUBLIC)
	$(INSTALL) --python $(PUBLIC)/bin/python --editable ".[onnx]" \
	  --requirement tests/public/requirements.txt
	@touch $@

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what runs and tests left behind; the environments stay
	rm -rf site outputs exported lightning_logs wandb build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./$(LOWEST) -o -path ./$(PUBLIC) -o -path ./$(DOCS) \) -prune -o -name __pycache__ -type d -exec rm -rf {} +
