PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# As many files of tests at a time as there are cores; ranks wait for each other more than they compute.
BESIDE_EACH_OTHER := -n auto --maxprocesses 8 --dist loadfile

.PHONY: help install quickstart test suite test-unit test-full docs docs-pages docs-check lint types peers benchmark clean

help:
	@echo 'make quickstart   train a small model at tensor 2 x pipeline 2 on this machine, from text to curves'
	@echo 'make test-unit    the tests that start no process: a minute'
	@echo 'make test         lint, types and the test suite: what CI runs'
	@echo 'make test-full    also the long proofs'
	@echo 'make docs         build the site of docs/ into site/; a warning is an error'
	@echo 'make docs-pages   write the reference pages anew that are made from the code'
	@echo 'make docs-check   run the commands of README, docs/ and examples/ as a reader would'
	@echo 'make peers        Megatron-core, which some long proofs are beside'
	@echo 'make benchmark    training steps, schedules and ZeRO stages beside their peers, into benchmarks/results/'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo 'installing into .venv: a few minutes the first time'
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and f"megalite needs Python 3.11 or 3.12, not {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/quickstart/quickstart.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

test-unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m unit $(BESIDE_EACH_OTHER) --hypothesis-profile quick

# The types are checked beside the tests, which often wait.
test: install
	@$(MAKE) --no-print-directory --jobs=2 lint types suite

suite: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not full' $(BESIDE_EACH_OTHER)

# Megatron-core's own requirements would bring other versions of ours; for its datasets torch and numpy are enough.
peers: install
	@$(BIN)/python -c 'import megatron.core' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps megatron-core==0.16.1

test-full: lint types peers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

docs: install
	@$(BIN)/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'site/index.html'

docs-pages: install
	$(BIN)/python tools/reference_pages.py

docs-check: install
	$(BIN)/python tools/docs_check.py

benchmark: install
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/parallel.py

clean:
	rm -rf .venv site .pytest_cache .ruff_cache .hypothesis
