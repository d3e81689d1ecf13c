# Set-up, demo, tests and checks. `make` alone lists them.
#
# PYTHON=python3.12 make demo     another interpreter for .venv (3.10 to 3.13)
# make test PYTEST_ARGS='-k head' arguments handed on to pytest; '-n 0' runs all in one process
# make test WORKERS=4            processes that share the tests; default: 2
# make bench BENCH_ARGS='ops --rounds 3'   one suite; DATA_DIR=FOLDER adds training steps on the data sets in it
# make gpu PART=ops              a part of the checks on a card: correctness, ops, train or memory; default: all
# make bench-save PYTEST_ARGS='-k tiled' those calls only; `make bench-compare` takes the same
# make integrations TRL=1.16     one release beside which the integrations are held; default: all
# pip's own settings (PIP_INDEX_URL, pip.conf, ...) are respected.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
WORKERS ?= 2
PART ?=
TRL ?=
INTEGRATIONS_ARGS ?=
GPU_ARGS ?=
BENCH_ARGS ?=
DATA_DIR ?=

SETUP_FILES := setup.py pyproject.toml constraints.txt
RUN_EXTRAS := train,demo,report
DEV_EXTRAS := $(RUN_EXTRAS),dev,trl,liger

# A file's tests stay in one process, since they share what its fixtures made. Files go out in the order of collection, in which
# tests/conftest.py puts the longest first; by xdist's own order, that of the number of tests, they would come last.
SHARED_OUT = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# pip shows its progress in a terminal and keeps quiet in a log.
PIP_INSTALL = quiet=--quiet; [ -t 1 ] && quiet=; $(BIN)/python -m pip install $$quiet --disable-pip-version-check -c constraints.txt -e

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench bench-save bench-compare gpu integrations lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed  ## train a real 135M model with DPO on the example pairs, and show that it worked
	$(BIN)/dpo-engine train examples/demo.yaml

test: $(VENV)/.installed-dev  ## run the tests, without those marked slow or gpu
	$(BIN)/python -m pytest -m "not slow and not gpu" $(SHARED_OUT) $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev  ## run every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

bench: $(VENV)/.installed-dev  ## measure everything here (an hour and a half on two quiet cores), then draw it
	DATA_DIR='$(DATA_DIR)' $(BIN)/dpo-engine bench $(BENCH_ARGS)
	$(if $(findstring --smoke,$(BENCH_ARGS)),,$(BIN)/dpo-engine bench report)

# Without the tests' own options: those switch pytest-benchmark off, and its figures are of one process.
REGRESSION = $(BIN)/python -m pytest benchmarks/regression -p no:xdist -o addopts= -m "not slow" $(PYTEST_ARGS)

bench-save: $(VENV)/.installed-dev  ## time small calls of the operator and keep the figures in .benchmarks/
	$(REGRESSION) --benchmark-autosave

bench-compare: $(VENV)/.installed-dev  ## time them again beside the figures that were kept last
	$(REGRESSION) --benchmark-compare

# For machines that have torch, Triton and pytest already and perhaps no network: nothing is installed, .venv is not used.
gpu:  ## on a machine with an NVIDIA GPU: its checks and timings, by $(PYTHON) as it is
	@$(PYTHON) -m benchmarks.gpu $(PART) $(GPU_ARGS)

integrations: $(VENV)/.installed-dev  ## TRL's trainers with the engine and without, in an environment for each release
	$(BIN)/python -m benchmarks.integrations $(if $(TRL),--only $(TRL)) $(INTEGRATIONS_ARGS)

lint: $(VENV)/.installed-dev  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and everything built or cached here (runs/ stays)
	rm -rf $(VENV) .integrations build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv puts there, so a set-up that was killed half-way is made again.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found; install Python 3.10 to 3.13 or name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.10 to 3.13 is needed, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv) or name another interpreter: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "Making $(VENV) with $$($(PYTHON) -V 2>&1)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SETUP_FILES) | $(BIN)/pip
	@echo "Installing what the demo needs into $(VENV) (once; torch and its libraries are the large part)"
	@$(PIP_INSTALL) '.[$(RUN_EXTRAS)]'
	@touch $@

# Holds all that the demo needs too, so that `make demo` after `make test` installs nothing.
$(VENV)/.installed-dev: $(SETUP_FILES) | $(BIN)/pip
	@echo "Installing what the demo and the tests need into $(VENV) (once; torch and its libraries are the large part)"
	@$(PIP_INSTALL) '.[$(DEV_EXTRAS)]'
	@touch $(VENV)/.installed $@
