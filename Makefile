# What a user or a contributor types. The first target that needs it makes .venv with the versions of constraints.txt.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help study dashboard check fix test test-ci test-all

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

study: $(VENV)/.installed ## from nothing to verdicts: train and judge the first study, less than 10 minutes on two cores
	@echo "To use the lines that follow in another terminal, first type: source $(BIN)/activate" >&2
	$(BIN)/python -m workbench run studies/refinement_detach.yaml

dashboard: $(VENV)/.installed ## look at what has been run, in a browser
	$(BIN)/streamlit run dashboard/app.py

check: $(VENV)/.installed-dev ## format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

fix: $(VENV)/.installed-dev ## repair format and lint where ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: $(VENV)/.installed-dev ## the fast tests, under 5 minutes on two cores
	$(PYTEST) -n $(WORKERS) -m "not ci and not slow"

test-ci: $(VENV)/.installed-dev ## the tests that need Ray, a browser or about a minute
	$(PYTEST) -m ci

test-all: $(VENV)/.installed-dev ## every test, one after another
	$(PYTEST)

# `make study` installs no development tools; the stamps make each installation happen once per change of the two files.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): some minutes and several GB the first time (PyTorch), then never again." >&2
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV), with development tools: some minutes and several GB the first time (PyTorch)." >&2
	@$(INSTALL) --editable '.[dev]'
	@touch $(VENV)/.installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is missing or older than 3.11. Name another one: make $(MAKECMDGOALS) PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
