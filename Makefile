.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.12 || { command -v pyenv >/dev/null && pyenv which python3.12; } 2>/dev/null || echo python3)
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
INSTALLED := $(VENV)/.installed
INSTALLED_CUDA := $(VENV)/.installed-cuda
RUN ?= runs/ml100k_hstu
export PYTHONDONTWRITEBYTECODE := 1

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
		{ echo "Python 3.12 is needed, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1): install it (pyenv install 3.12, or uv python install 3.12), or name it: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

REQUIREMENTS := requirements.txt requirements-serve.txt requirements-dev.txt
$(INSTALLED): $(REQUIREMENTS) constraints.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) --quiet $(REQUIREMENTS:%=-r %) -c constraints.txt
	$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@touch $@

install: $(INSTALLED)  ## make .venv with the package itself and everything for CPU, tests and lint

$(INSTALLED_CUDA): requirements-cuda.txt $(INSTALLED)
	$(PIP) -r requirements-cuda.txt -c constraints.txt
	@touch $@

install-cuda: $(INSTALLED_CUDA)  ## the same for NVIDIA GPUs (CUDA 13), with jax-triton

demo: $(INSTALLED)  ## train a small HSTU beside SASRec, compare, draw, recommend (a few minutes on 2 cores)
	$(PY) -m experiments.demo

test: $(INSTALLED)  ## the whole test suite on CPU
	JAX_PLATFORMS=cpu $(PY) -m pytest -q -n 2 --dist=worksteal --ignore=tests/gpu

fuzz: $(INSTALLED)  ## the property tests on examples that are drawn anew
	JAX_PLATFORMS=cpu $(PY) -m pytest -q -n 2 -m hypothesis --hypothesis-profile=fuzz --ignore=tests/gpu

test-gpu: $(INSTALLED)  ## the kernels on this machine's GPU (after install-cuda)
	$(PY) -m pytest -q -n 8 --dist=worksteal tests/gpu --record=experiments/results/test_gpu.json

package: $(INSTALLED)  ## build the wheel, install it elsewhere, call attention and a command there
	$(PY) -m pytest -q tests/test_package.py

lint: $(INSTALLED)  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

page: $(INSTALLED)  ## walk through the page of a served run in headless Chromium, and draw it
	$(PY) -m scripts.page --workdir=$(RUN) --picture=docs/figures/page.png

tables: $(INSTALLED)  ## write the tables and figures of README and docs anew from experiments/results
	$(PY) -m scripts.tables.make

clean:  ## remove .venv, builds and runs; prepared data (~/.local/share/ultra-hstu/data) stays
	rm -rf $(VENV) build *.egg-info runs .pytest_cache .ruff_cache .mypy_cache .hypothesis

.PHONY: help install install-cuda demo test fuzz test-gpu package lint page tables clean
