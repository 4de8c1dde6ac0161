# `make demo` and `make test` need Python 3.11 or newer and nothing else of ours; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread: small models on two threads that wait for each other are many times slower.
RUN := OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0
OUT ?= demo-out

.PHONY: setup demo test lint types check bench families clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(RUN) $(BIN)/emkd demo --out $(OUT)

test: setup
	$(RUN) $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

check: lint types test

# docs/families.md from the outcome of its tests.
families: setup
	$(RUN) $(BIN)/python -m tests.families.table

# About an hour on an idle machine. Runs the demonstration first if its folder does not exist.
bench: setup $(OUT)/results.json
	$(RUN) $(BIN)/python -m benchmarks.matching.all $(OUT)
	$(RUN) $(BIN)/python -m benchmarks.step.optimizer_step
	$(RUN) $(BIN)/python -m benchmarks.storage.all

$(OUT)/results.json:
	$(MAKE) demo

clean:
	rm -rf $(VENV) $(OUT)
