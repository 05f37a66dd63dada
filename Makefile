# `make demo` runs a whole site on this machine, `make test` runs all checks; both run the setup first. See README.md.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CODE := node protocol cache simulations
WITH_TESTS := $(CODE) tests
LOCK_TOOLS := build/lock-tools

.PHONY: help setup packages demo test test-quick picture lint types imports bench chaos churn fuzz lock clean

help:
	@echo "make demo | test | test-quick | bench | chaos | churn | fuzz | setup | picture | lint | types | imports | lock | clean"

packages:
	@.ci/packages

setup: packages $(VENV)/.project

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (Debian 12: apt-get install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.locked: requirements-dev.lock $(VENV)/bin/python
	@echo "Installing the locked dependencies into $(VENV)"
	@$(PIP) install --require-hashes -r requirements-dev.lock 2> >(grep -v DEPRECATION >&2)
	@# py-libp2p needs trio-typing at run time. Its outdated trio-stubs would hide trio's own type hints from mypy.
	@rm -rf $(VENV)/lib/python3*/site-packages/trio-stubs
	@touch $@

$(VENV)/.project: pyproject.toml $(VENV)/.locked
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	@$(BIN)/python -m tests.demo

test: setup
	@$(MAKE) --no-print-directory lint types imports
	@$(BIN)/python -m pytest

# Everything but real daemons and simulations: two minutes, for use while editing.
test-quick: setup
	@$(MAKE) --no-print-directory lint types imports
	@$(BIN)/python -m pytest --quiet tests/unit tests/property tests/conformance

# ruff, then sizes, names and language (.ci/house.py), then whether the picture of the rooms is that of the code.
lint: setup
	@$(BIN)/ruff format --check $(WITH_TESTS) .ci
	@$(BIN)/ruff check $(WITH_TESTS) .ci
	@$(BIN)/python .ci/house.py
	@PYTHONPATH=. $(BIN)/python .ci/picture.py --check

picture: setup
	@PYTHONPATH=. $(BIN)/python .ci/picture.py

types: setup
	@$(BIN)/mypy
	@$(BIN)/mypy --strict .ci/house.py .ci/picture.py

imports: setup
	@$(BIN)/lint-imports

bench: setup
	@for benchmark in tests/benchmarks/*.py; do \
		name=$${benchmark%.py}; echo "== $$name"; $(BIN)/python -m "$${name//\//.}" || failed=1; done; exit $${failed:-0}

# Runs a site under faults for ten minutes: `make chaos SEED=7`. The same seed repeats a failed run.
SEED ?= 1
chaos: setup
	@$(BIN)/python -m tests.chaos --seed $(SEED)

# Members and clients come and go for half an hour; fails if a resource of the daemons grows.
MINUTES ?= 30
churn: setup
	@$(BIN)/python -m tests.chaos --churn --seed $(SEED) --minutes $(MINUTES) --nodes 5

# atheris is not a dependency of the tests, which run the same targets without it (tests/property/test_fuzz_corpus.py).
FUZZ_TOOLS := build/fuzz-tools
SECONDS ?= 300

$(FUZZ_TOOLS)/atheris: | setup
	@$(PIP) install --target $(FUZZ_TOOLS) 'atheris>=3,<4'

fuzz: setup $(FUZZ_TOOLS)/atheris
	@PYTHONPATH=$(FUZZ_TOOLS) $(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(TARGETS)

# PIP_FIND_LINKS is emptied: packages on one machine must not decide what all machines install.
lock:
	@$(PYTHON) -m venv $(LOCK_TOOLS)
	@$(LOCK_TOOLS)/bin/pip install --quiet 'pip-tools>=7.6,<8'
	@export PIP_FIND_LINKS=; compile="$(LOCK_TOOLS)/bin/pip-compile --quiet --upgrade --generate-hashes --allow-unsafe \
		--strip-extras --no-header --no-emit-index-url --no-emit-find-links --no-emit-trusted-host"; \
	$$compile --output-file=requirements.lock pyproject.toml; \
	$$compile --extra=dev --all-build-deps --constraint=requirements.lock \
		--output-file=requirements-dev.lock pyproject.toml

clean:
	rm -rf $(VENV) build dist .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(WITH_TESTS) -name __pycache__ -type d -prune -exec rm -rf {} +
