# `make` lists the targets. Everything runs in .venv, which the first target that needs it makes.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow lint types imports check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: .venv/.installed ## draw a small set of digits and fine-tune on it
	$(BIN)/python scripts/make_digits.py data/digits --per-class 30 --jitter
	$(BIN)/hfft train configs/quickstart.yaml --overwrite

test: .venv/.installed-dev ## the fast tests, in a process a core, four at most
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4

test-slow: .venv/.installed-dev ## the slower tests: launchers, training runs, the wheel
	$(BIN)/python -m pytest -m slow

lint: .venv/.installed-dev ## style and formatting (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-dev ## types (mypy, strict)
	$(BIN)/mypy

imports: .venv/.installed-dev ## imports run downwards only (import-linter)
	$(BIN)/lint-imports

check: lint types imports test test-slow ## all of the above but the quickstart

format: .venv/.installed-dev ## rewrite the code to the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and built packages; .venv, data and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hfft needs Python 3.11 or newer and '$(PYTHON)' is not: try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "'$(PYTHON)' has no venv module: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch .venv/.installed $@
