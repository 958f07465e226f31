# Every target runs in .venv, which is created when it is first needed. Start with `make demo`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo chaos mutate test test-slow test-slurm lint format bench gpu gpu-check clean help

help:            ## List the targets
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test,lint,browser]' --constraint constraints.txt
	touch $@

install: $(STAMP) ## Make .venv with this project and what it needs; then: source .venv/bin/activate

demo: $(STAMP)   ## Train a small NVAE on synthetic faces; results are in runs/nvae
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process 1 pipeline/train.py --model nvae tracking.wandb=disabled
	@echo "Sample pictures: runs/nvae/samples   metrics: runs/nvae/metrics.jsonl   checkpoints: runs/nvae/checkpoints"

chaos: $(STAMP)  ## Kill training runs 100 times and compare them with uninterrupted runs (half an hour)
	$(BIN)/python -m tests.chaos --kills 100

mutate: $(STAMP) ## Make deliberate mistakes in the code and check that the tests notice them (long)
	$(BIN)/python -m tests.mutate

test: $(STAMP)   ## Run the tests on up to four cores (ten minutes on two)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not slow"

test-slow: $(STAMP) ## Run the slow tests, which start many processes or train for long
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup -m slow

test-slurm: $(STAMP) ## Run all SLURM tests on the cluster that the script SLURM_LAB=FILE starts on this machine
	@test -f "$(SLURM_LAB)" || { echo "error: name the script that starts a SLURM cluster on this machine: make test-slurm SLURM_LAB=FILE (docs/slurm.md)" >&2; exit 2; }
	SLURM_LAB="$(SLURM_LAB)" SLURM_LONG=1 $(BIN)/python -m pytest -q tests/test_slurm.py

lint: $(STAMP)   ## Check style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x slurm/*.sh .ci/run

format: $(STAMP) ## Format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Measure training steps, shard sets and checkpoints (takes minutes; leave the machine idle)
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.checkpoint

gpu: $(STAMP)    ## Measure training on one GPU; results in benchmarks/results (ten minutes)
	$(BIN)/python -m benchmarks.gpu

gpu-check: $(STAMP) ## Check that the GPU computes what a CPU computes (five minutes)
	$(BIN)/python -m benchmarks.gpu_check

clean:           ## Remove the environment and caches; keep data/ and runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
