# `make demo` and `make test` need only Python 3.11 or newer; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := --constraint constraints.txt
# One thread: small models on two threads that wait for each other are many times slower.
RUN := OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0
OUT ?= demo-out

.PHONY: setup demo test test-fast lint types docs check check-newest bench families rooms clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: setup
	$(RUN) $(BIN)/emkd demo --out $(OUT)

test: setup
	$(RUN) $(BIN)/python -m pytest -n 2 --dist loadgroup

# Without the tests that train, start Ray or build packages.
test-fast: setup
	$(RUN) $(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

# The site, in site/; a warning is an error. The variable hides an advertisement.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types docs test

# Lint, types and the fast tests with the newest release of everything that pyproject.toml allows, and with the newest
# transformers whether it is allowed or not. Makes .venv-newest from scratch.
check-newest:
	rm -rf .venv-newest
	$(MAKE) VENV=.venv-newest CONSTRAINTS= setup
	.venv-newest/bin/python -m pip install --quiet --upgrade transformers
	.venv-newest/bin/python -m pip list
	$(MAKE) VENV=.venv-newest lint types test-fast

# docs/rooms.svg from the imports.
rooms: setup
	$(BIN)/python -m tools.draw_rooms

# docs/families.md from the results of its tests.
families: setup
	$(RUN) $(BIN)/python -m tests.families.table

# About two hours on an idle machine. Runs the demonstration first if its folder does not exist.
bench: setup $(OUT)/results.json
	$(RUN) $(BIN)/python -m benchmarks.matching.all $(OUT)
	$(RUN) $(BIN)/python -m benchmarks.step.optimizer_step
	$(RUN) $(BIN)/python -m benchmarks.storage.all
	$(RUN) $(BIN)/python -m benchmarks.storage.codes
	$(RUN) $(BIN)/python -m benchmarks.real_lm

$(OUT)/results.json:
	$(MAKE) demo

clean:
	rm -rf $(VENV) .venv-newest $(OUT) site
