# Two commands do everything: `make figures` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
# quick or full
BUDGET ?= quick
# not empty: serve the book once it is built
SERVE ?=
# one or more notebooks, such as ONLY=08 or ONLY=01,02; all if empty
ONLY ?=
# how many notebooks, or tests, at a time; each takes one thread
JOBS ?= 2
VENV ?= .venv
BIN ?= $(VENV)/bin
# The newest Python ≥ 3.11 under a usual name; `make PYTHON=/path/to/python3.12 ...` overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# `make LOCKED=1 ...` installs the very versions behind the stored outputs.
# `make CPU='--index-url ...' ...` installs PyTorch from its own CPU wheels, small and without GPU libraries.
CPU ?=
PIN := $(if $(LOCKED),-c constraints.txt,)
# Where tests draw (never into the gallery), and where mypy and Hypothesis keep their notes: from a read-only checkout,
# `make test BUILD=/a/folder PLANAR_RUNS=... VENV=...`; Python itself keeps no byte code where it cannot write.
BUILD ?= $(or $(PLANAR_FIGURES),$(CURDIR)/build)
# A search path or a backend of the user's own reaches no test and no notebook.
CLEAN := env -u PYTHONPATH -u PYTHONWARNINGS -u MPLBACKEND OMP_NUM_THREADS=1 HYPOTHESIS_STORAGE_DIRECTORY="$(BUILD)/hypothesis"

.DEFAULT_GOAL := help
.PHONY: help environment figures test lab notebooks readme sweep bench mutants stress versions browser assignments handout grade book book-test clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' "$(firstword $(MAKEFILE_LIST))" | sed -E 's/:.*## /\t/' | expand -t 12

figures: environment  ## Run the notebooks and write the figures (BUDGET=quick or full, ONLY=08, JOBS=2)
	PLANAR_BUDGET="$(BUDGET)" "$(BIN)/python" notebooks/execute.py --jobs "$(JOBS)" $(ONLY)

test: environment  ## Lint, types, tests, doctests, and the notebooks under nbval at the quick budget
	"$(BIN)/ruff" check --no-cache . && "$(BIN)/ruff" format --no-cache --check .
	$(CLEAN) "$(BIN)/python" -m mypy --cache-dir="$(BUILD)/mypy" planar_helpers
	$(CLEAN) "$(BIN)/python" -m pytest -q -n "$(JOBS)" --dist=loadfile -p no:cacheprovider tests planar_helpers
	$(CLEAN) PLANAR_BUDGET=quick PLANAR_FIGURES="$(BUILD)/test-figures" "$(BIN)/python" -m pytest -q \
		-n "$(JOBS)" --dist=loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=600 -p no:cacheprovider notebooks

lab: environment  ## Open JupyterLab on copies of the notebooks, in my_notebooks/
	PLANAR_BUDGET="$(BUDGET)" "$(BIN)/python" notebooks/lab.py

notebooks: environment  ## For maintainers: execute in place at the full budget, clean, for committing (ONLY=08, JOBS=2)
	PLANAR_BUDGET=full "$(BIN)/python" notebooks/execute.py --in-place --jobs "$(JOBS)" $(ONLY)

readme: environment  ## State the stored numbers and minutes in the READMEs and the notebooks again
	"$(BIN)/python" notebooks/restate.py

sweep: environment  ## Make the runs behind notebooks 08 and 10 that are not made yet (hours; it can be stopped; JOBS=2)
	set -e; for plan in figures/results/runs/*.plan; do $(CLEAN) "$(BIN)/python" -m planar_helpers sweep --plan "$$plan" --jobs "$(JOBS)"; done

bench: environment  ## Compare speeds in one run, as ratios, in figures/bench.md (ten minutes, on a quiet machine)
	"$(BIN)/python" -m pip install -qq -e ".[bench]"
	mkdir -p "$(BUILD)"
	$(CLEAN) "$(BIN)/python" -m pytest -q -o addopts=--import-mode=importlib -o filterwarnings=default -p no:cacheprovider \
		--benchmark-json="$(BUILD)/bench.json" tests/bench.py
	$(CLEAN) "$(BIN)/python" tests/bench.py "$(BUILD)/bench.json"

mutants: environment  ## Change the package in small ways and see a test fail for each
	$(CLEAN) "$(BIN)/python" tests/mutants.py

stress: environment  ## Kill, fill, starve and attack it, at full counts, and write the table in tests/README.md
	$(CLEAN) "$(BIN)/python" tests/stress.py --jobs "$(JOBS)"

# Beside the project's own environment, removed afterwards: the oldest PyTorch that pyproject.toml allows.
OLDEST = $(shell sed -n 's/^ *"\(torch[a-z]*\)>=\([0-9.]*\)",/\1==\2.*/p' pyproject.toml)
versions:  ## Run the unit tests with the oldest PyTorch that pyproject.toml allows (downloads it; Python 3.11 or 3.12)
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && "$(PYTHON)" -m venv "$$folder" && \
		"$$folder/bin/python" -m pip install -qq $(OLDEST) "numpy<2.3" $(if $(filter-out 1,$(CPU)),$(CPU),) && \
		"$$folder/bin/python" -m pip install -qq -e ".[test,lab]" && \
		$(CLEAN) "$$folder/bin/python" -m pytest -q -n "$(JOBS)" --dist=loadfile -p no:cacheprovider tests planar_helpers

book: environment  ## Build the book, a site of static pages, into build/book/ (SERVE=1 serves it on this machine)
	"$(BIN)/python" -m pip install -qq -e ".[book]"
	"$(BIN)/python" book/build.py $(if $(SERVE),--serve)

book-test: book  ## Read the book in a real browser, without a network (needs Chromium)
	"$(BIN)/python" -m pip install -qq -e ".[browser]"
	"$(BIN)/python" tests/browser_book.py

browser: environment  ## Use the playground and `make lab` in a real browser (needs Chromium)
	"$(BIN)/python" -m pip install -qq -e ".[browser]"
	"$(BIN)/python" tests/browser_playground.py
	"$(BIN)/python" tests/browser_playground.py --mutants
	"$(BIN)/python" tests/browser_panel.py
	"$(BIN)/python" tests/browser_panel.py --lab

assignments: environment  ## Write the student copies of the assignments (PRIVATE=number TO=folder: a private variant)
	"$(BIN)/python" notebooks/assignments/release.py $(if $(PRIVATE),--private "$(PRIVATE)" --to "$(TO)")

# N: a notebook's number (its formulae and questions), 00 (the formula sheet), or an assignment's, such as A1
N ?=
handout: environment  ## Write a page to print, without answers, into build/handouts/ (N=02, N=00 the formula sheet, N=A1)
	@"$(BIN)/python" -c 'import latex2mathml' 2>/dev/null || "$(BIN)/python" -m pip install -qq $(PIN) "latex2mathml>=3.77"
	"$(BIN)/python" notebooks/assignments/handout.py "$(N)"

# MASTERS: a private variant's folder. Formulas in the feedback, and nbgrader for those who use it, are an extra.
SUBMISSIONS ?=
GRADES ?= $(CURDIR)/build/grades
MASTERS ?= notebooks/assignments/solutions
grade: environment  ## Grade a folder from Moodle, Canvas or name/A1.ipynb (SUBMISSIONS=folder, GRADES=folder)
	@test -d "$(SUBMISSIONS)" || { echo "say which folder: make grade SUBMISSIONS=folder"; exit 2; }
	@"$(BIN)/python" -c 'import latex2mathml, nbgrader' 2>/dev/null || "$(BIN)/python" -m pip install -qq $(PIN) -e ".[grade]"
	$(CLEAN) "$(BIN)/python" notebooks/assignments/grade.py "$(SUBMISSIONS)" --grades "$(GRADES)" --masters "$(MASTERS)"

clean:  ## Remove the environment, build/ and trained models; my_notebooks/ stays
	rm -rf "$(VENV)" build runs

# The stamp is a file, asked for by the shell: make itself cannot name a path with a blank in it.
environment:
	@if [ "$(BIN)" = "$(VENV)/bin" ] && ! [ "$(VENV)/.installed" -nt pyproject.toml -a "$(VENV)/.installed" -nt constraints.txt ]; \
		then $(MAKE) --no-print-directory install; fi

.PHONY: install
install:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found: install it, or name it with make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) lacks venv: install it (Debian, Ubuntu: apt install python3-venv) and run make again"; exit 1; }
	@echo "Creating $(VENV) and installing (PyTorch is large: a minute or several)"
	"$(PYTHON)" -m venv "$(VENV)"
	"$(VENV)/bin/python" -m pip install -qq --upgrade pip
	@if [ -n "$(CPU)" ] && ! "$(VENV)/bin/python" -c 'import torch' 2>/dev/null; then \
		if [ "$(CPU)" = 1 ]; then echo "CPU=1: the small PyTorch is not on the ordinary index. On PyTorch's page \"Get started\", choose Pip"; \
			echo "and CPU, and give make what the line there has after the packages' names: make CPU='--index-url ...' figures"; exit 1; \
		else "$(VENV)/bin/python" -m pip install -qq $(PIN) torch torchvision $(CPU); fi; fi
	@if [ -w . ]; then "$(VENV)/bin/python" -m pip install -qq $(PIN) -e ".[test,lab]"; \
		else copy=$$(mktemp -d) && cp -r pyproject.toml README.md LICENSE planar_helpers "$$copy" && chmod -R u+w "$$copy" && \
			"$(VENV)/bin/python" -m pip install -qq $(PIN) "$$copy[test,lab]" && rm -rf "$$copy"; fi
	@touch "$(VENV)/.installed"
