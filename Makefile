# `make help` lists what there is. Needs make and Python >= 3.10; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
OUT ?= .
CONSTRAINTS ?= constraints.txt

python := $(abspath $(VENV))/bin/python
install := $(python) -m pip install --disable-pip-version-check -c $(CONSTRAINTS)
pytest := OMP_NUM_THREADS=1 $(python) -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help install demo test test-oldest lint check clean

help:
	@echo "make demo     draw road scenes, train a teacher on them, train students alone, distilled and solved from it"
	@echo "make test     the tests that take seconds"
	@echo "make test-oldest  the same with the oldest versions that the package admits, in .venv-oldest"
	@echo "make check    everything: lint, types, all tests"
	@echo "make lint     ruff and mypy alone"
	@echo "make install  the environment for development, without running anything"
	@echo "make clean    remove $(VENV), .venv-oldest and caches; outputs/ and data/ stay"
	@echo
	@echo "PYTHON=$(PYTHON)  makes the environment; 3.10 or newer"
	@echo "VENV=$(VENV)     where the environment lies"
	@echo "OUT=$(OUT)          where the demo puts data/ and outputs/"

# The stamps lie in the environment, so that removing it removes them. A failed install leaves none.
$(VENV)/.package: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("transkd needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --disable-pip-version-check --quiet --upgrade pip
	$(install) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	$(install) -e '.[dev]'
	@touch $@

install: $(VENV)/.dev

# The student alone, distilled, and solved from its teacher, each for the same epochs; one table at the end.
demo: $(VENV)/.package
	mkdir -p $(OUT) && cd $(OUT) && $(python) -m transkd.train -m +experiment=demo distill=none,transkd_cwd,solve
	@cd $(OUT) && $(python) $(CURDIR)/scripts/sweep_table.py $$(ls -td outputs/demo/sweep_* | head -n 1)

test: $(VENV)/.dev
	$(pytest)

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

lint: $(VENV)/.dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

check: lint
	$(pytest) -m "slow or not slow"

clean:
	rm -rf $(VENV) .venv-oldest .pytest_cache .mypy_cache .ruff_cache
