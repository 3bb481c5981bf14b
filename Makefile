# Every target sets up what it needs: an own virtual environment in .venv with the pinned versions.
PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PAGES := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench docs

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'margeq needs Python 3.11 or newer: make PYTHON=python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	# One resolver run: torch and torchvision have to be chosen together.
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[dev]'
	@touch $@

# The site and the notebooks take some hundred megabytes more, which most changes do not need.
$(PAGES): $(STAMP)
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e '.[dev,docs,notebooks]'
	@touch $@

demo: $(STAMP)  ## which symmetry does each layer choose? real digits, offline (ARGS='--seed 1')
	$(BIN)/margeq demo $(ARGS)

# One thread per worker: two workers then use two cores, not four.
test: $(STAMP)  ## the tests that decide a change (ARGS='-k digits')
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: $(STAMP) $(PAGES)  ## the same and the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'slow or not slow' $(ARGS)

lint: $(STAMP)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright margeq

bench: $(STAMP)  ## costs as multiples of a plain epoch, beside laplace-torch
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(ARGS)

docs: $(PAGES)  ## this documentation as a site, in docs/_build/html
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html
	@echo 'docs/_build/html/index.html'
