# Two commands do everything: `make figures` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
BUDGET ?= quick
VENV := .venv
BIN := $(VENV)/bin
# The newest Python ≥ 3.11 under a usual name; `make PYTHON=/path/to/python3.12 ...` overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# `make LOCKED=1 ...` installs the very versions behind the stored outputs.
PIN := $(if $(LOCKED),-c constraints.txt,)
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help figures test lab notebooks bench browser clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

figures: $(VENV)/.installed  ## Run every notebook and write the figures (BUDGET=quick or full)
	PLANAR_BUDGET=$(BUDGET) $(BIN)/python notebooks/execute.py

test: $(VENV)/.installed  ## Lint, tests, doctests, and the notebooks under nbval at the quick budget
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist=loadfile tests planar_helpers
	OMP_NUM_THREADS=1 PLANAR_BUDGET=quick PLANAR_FIGURES=$(CURDIR)/build/test-figures $(BIN)/python -m pytest -q \
		-n $(JOBS) --dist=loadfile --nbval-lax --nbval-cell-timeout=600 -p no:cacheprovider notebooks

lab: $(VENV)/.installed  ## Open JupyterLab on notebook 00
	PLANAR_BUDGET=$(BUDGET) $(BIN)/jupyter lab notebooks/00_start_here.ipynb

notebooks: $(VENV)/.installed  ## For maintainers: execute in place at the full budget, clean, for committing
	PLANAR_BUDGET=full $(BIN)/python notebooks/execute.py --in-place

bench: $(VENV)/.installed  ## Compare speeds in one run, as ratios
	$(BIN)/python tests/bench.py

browser: $(VENV)/.installed  ## Move the panel of notebook 02 in a real JupyterLab (needs Chromium)
	$(BIN)/pip install -qq -e ".[browser]"
	$(BIN)/python tests/browser_panel.py

clean:  ## Remove the environment, build/ and trained models
	rm -rf $(VENV) build runs

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found: install it, or name it with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) lacks venv: install it (Debian, Ubuntu: apt install python3-venv) and run make again"; exit 1; }
	@echo "Creating $(VENV) and installing (PyTorch is large: a minute or several)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq $(PIN) -e ".[test]"
	@touch $@
