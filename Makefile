# make demo   train a network whose running averages go wrong, and see what recomputing gives
# make test   the test suite
# make quick  the same without what is slow: under two minutes
# make lint   style, types, and the directions of imports
# make figures  the figures of docs/ from real runs (some minutes)
# Each makes .venv on first use and reuses it afterwards.

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test quick lint figures clean

demo: .venv/installed
	$(BIN)/bnexp train configs/stale-averages.yaml
	$(BIN)/bnexp eval --recompute-stats

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

quick: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow'

lint: .venv/installed-dev
	$(BIN)/ruff check bnexp tests benchmarks docs
	$(BIN)/ruff format --check bnexp tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports

figures: .venv/installed-dev
	$(BIN)/python docs/figures/make.py

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("bnexp needs Python 3.11 or newer; try: make demo PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
