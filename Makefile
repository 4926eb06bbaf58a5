# `make help` lists the targets. Each creates the environment in $(VENV) when it is missing.
VENV ?= .venv
MODEL ?=
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
MINUTES ?= 20

BIN := $(VENV)/bin
RUNTIME := $(VENV)/.stamp-runtime
DEV := $(VENV)/.stamp-dev
LOCK := requirements.lock

# The first interpreter that starts and is new enough; set PYTHON=… to choose another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)

.PHONY: help serve bench test soak lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make serve [MODEL=folder-or-hub-id] [PORT=8000]   serve a model (default: the built-in one)"
	@echo "make bench [ARGS='--quick']                       measure beside other servers, if installed"
	@echo "make test  [ARGS='tests/core -k …']               run the tests"
	@echo "make soak  [MINUTES=20]                           everything at once, with faults; memory stays flat"
	@echo "make lint                                         ruff, mypy, import rules, size limits"
	@echo "make format                                       rewrite the code the way lint wants it"

serve: $(RUNTIME)
	$(BIN)/slipstream serve $(if $(MODEL),'$(MODEL)') --host $(HOST) --port $(PORT) $(ARGS)

bench: $(RUNTIME)
	$(BIN)/python -m tests.bench.side_by_side $(ARGS)

test: $(DEV)
	$(BIN)/python -m pytest $(ARGS)

soak: $(DEV)
	$(BIN)/python -m pytest -s -m slow tests/e2e/test_soak.py --minutes $(MINUTES)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/meta

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer with venv is needed; \
	install it, or name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml $(LOCK) | $(BIN)/python
	$(BIN)/python -m pip install --constraint $(LOCK) --editable .
	@touch $@

$(DEV): pyproject.toml $(LOCK) | $(BIN)/python
	$(BIN)/python -m pip install --constraint $(LOCK) --editable '.[dev]'
	@touch $(RUNTIME) $@
