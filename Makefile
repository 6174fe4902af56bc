# Two commands matter: `make demo` and `make test`. Both set up .venv on the first call and reuse it afterwards.
#   TORCH=existing       use the torch of the active Python environment instead of installing one
#   TORCH=REQUIREMENT    what pip installs as torch: a version, a wheel's path, ... (default: torch, pinned by constraints.txt)
#   PYTHON=python3.12    the interpreter that .venv is made with
# pip's own variables (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...) choose where packages come from.
PYTHON ?= python3
TORCH ?= torch
VENV := .venv
# A .venv that was made with TORCH=existing stays so.
ifneq ($(wildcard $(VENV)/lib/python*/site-packages/active-environment.pth),)
TORCH := existing
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Meson looks for ninja and cython on PATH and records where it found them; they must be .venv's own.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-all test-gpu lint notebooks clean help

help:
	@echo "make demo | test | test-all | test-gpu | lint | notebooks | clean      (TORCH=existing, PYTHON=...; see the top of the Makefile)"

demo: $(STAMP)
	$(BIN)/hybridlab run experiments/quickstart/config.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(BIN)/python -m pytest -q

test-all: lint
	$(BIN)/python -m pytest -q -m "slow or not slow"

# What needs a CUDA device; skipped, with a reason, without one.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

# Every notebook from its .py pair, in an empty copy of the project; what they show is written into the .ipynb.
notebooks: $(STAMP)
	$(BIN)/python scripts/execute_notebooks.py

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
ifeq ($(TORCH),existing)
	@$(PYTHON) -c "import torch" || { echo "TORCH=existing: no torch in the active $(PYTHON)" >&2; exit 2; }
endif
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),existing)
	@# A .pth file rather than --system-site-packages: that would skip the packages of an active venv.
	PATH="$${PATH#*:}" $(PYTHON) -c "import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))" \
	    > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active-environment.pth"
endif

# The editable install rebuilds changed kernels on import by itself; the stamp covers what changes the set-up.
$(STAMP): $(BIN)/python pyproject.toml constraints.txt meson.build $(wildcard cython_kernels/*)
ifeq ($(TORCH),existing)
	grep -v -e '^torch==' -e '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" >> $(VENV)/constraints.txt
else
	cp constraints.txt $(VENV)/constraints.txt
	$(PIP) install -q -c $(VENV)/constraints.txt "$(TORCH)"
endif
	$(PIP) install -q -c $(VENV)/constraints.txt meson-python meson ninja Cython
	$(PIP) install -q -c $(VENV)/constraints.txt --no-build-isolation \
	    --config-settings=build-dir=$(VENV)/build --editable ".[test,notebooks,jax]"
	touch $@
