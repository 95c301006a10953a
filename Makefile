# Everything here needs a python3 of 3.10 or newer and nothing else; the first command makes .venv, later ones reuse it.
#   PYTHON  the interpreter to make .venv with, e.g. make test PYTHON=python3.12
#   TORCH   what to install as PyTorch instead of the tested version (see tools/install.py), e.g. TORCH=torch==2.13.0+cu130
#   ARGS    passed on to pytest, e.g. make test ARGS="-k merge", or to tools/mutants
PYTHON ?= python3
TORCH ?=
ARGS ?=
BIN := .venv/bin
STAMP := .venv/installed
# The demo's packages alone; `make test` and others add the rest.
LEAN := .venv/demo-installed
# The tested versions hold for every call of pip, those that pip makes itself to build a package included. Relative, because
# pip splits this variable at spaces.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TORCH

.PHONY: gpu real real-clean test-real test-portable help demo test lint docs bench bench-check study study-real mutants test-faults clean

help:
	@echo "make demo    adapt the built-in model in three ways and see what was learned and forgotten"
	@echo "make test    run the tests"
	@echo "make test-portable  run the tests three more times: AVX2, no AMX, four threads"
	@echo "make real    fetch real pretrained models and data into .real (KEYS=\"smollm2 minilm\" for some; 600 MB in all)"
	@echo "make test-real  run the tests that use them"
	@echo "make lint    ruff and mypy"
	@echo "make docs    build the documentation into site/ and check its links"
	@echo "make bench   run every script in bench/; make bench-check compares with the figures in bench/results"
	@echo "make study   judge claims about learning and forgetting (hours; ARGS=--quick: half an hour)"
	@echo "make study-real  repeat its claims on SmolLM2's real weights (an hour of one core)"
	@echo "make mutants plant 60 faults one at a time and see whether the tests notice; ARGS=\"--seed 1\" for others, ARGS=--help for more"
	@echo "make test-faults  kill, damage, signal and race trainings and fill their disk, at every point; eight minutes"
	@echo "make gpu     check and time Veneer on this machine's GPU in eight minutes; the figures go to bench/results/gpu.json"
	@echo "make clean   remove .venv and what tests and builds left behind (not runs/)"

$(STAMP): pyproject.toml constraints.txt tools/install.py
	@$(PYTHON) tools/install.py .venv
	@touch $@ $(LEAN)

$(LEAN): pyproject.toml constraints.txt tools/install.py
	@$(PYTHON) tools/install.py .venv text,cli,plots
	@touch $@

demo: $(if $(wildcard $(STAMP)),$(STAMP),$(LEAN))
	$(BIN)/veneer demo

# Two processes of one thread each: tiny tensors gain nothing from more threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# Other instructions and thread counts sum in another order; see docs/promises.md.
test-portable: $(STAMP)
	ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)
	ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)
	OMP_NUM_THREADS=4 $(BIN)/python -m pytest -n 1 $(ARGS)

real: $(STAMP)
	PYTHONPATH=tools HF_HUB_OFFLINE=1 $(BIN)/python -m real $(KEYS)

real-clean:
	rm -rf $${VENEER_REAL:-.real}

# The sample of these that `make test` runs takes a minute.
test-faults: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=tools $(BIN)/python -m faults $(ARGS)

# Skipped tests fail here: the models of `make real` have to be there.
test-real: real
	OMP_NUM_THREADS=1 VENEER_REAL_REQUIRED=1 $(BIN)/python -m pytest -m real $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs site
	$(BIN)/python tools/links.py site

bench: $(STAMP)
	@set -e; for script in bench/[a-z]*.py; do case $$script in bench/check.py) continue;; esac; echo "== $$script"; $(BIN)/python "$$script"; done

bench-check: $(STAMP)
	$(BIN)/python bench/check.py

# Resumable: the same command goes on. Each text in a process of its own, then the page; ARGS=--quick takes half an hour
# on two cores.
study: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/veneer study --part prose $(ARGS) & OMP_NUM_THREADS=1 $(BIN)/veneer study --part c $(ARGS); wait
	OMP_NUM_THREADS=1 $(BIN)/veneer study --to docs/study $(ARGS)

study-real: KEYS = smollm2
study-real: real
	OMP_NUM_THREADS=1 $(BIN)/veneer study --part smollm2 --to docs/study

mutants: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=tools $(BIN)/python -m mutants $(ARGS)

# Offline, each part in a process of its own under its limit; says so and succeeds where there is no card.
gpu: $(STAMP)
	PYTHONPATH=tools $(BIN)/python -m gpu $(ARGS)

clean:
	rm -rf .venv build dist site docs/generated src/*.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +
