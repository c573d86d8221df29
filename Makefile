# Everything from set-up to a trained smoke model. `make help` lists the targets.

BIN    := .venv/bin
STAMP  := .venv/.installed
SMOKE  := datasets/smoke/dataset.json
NEEDLES := datasets/needles/words.json
CHAT   := datasets/chat/chat.json
SUMS   := datasets/sums/demonstrations.jsonl.chat.k25index
AGENTS := datasets/agents/demonstrations.jsonl.chat.k25index
SMOKE_RUN := runs/smoke/checkpoints/step_160/manifest.json
ENGINE := .venv-engine

# Tests run on this many processes at once, a file on one of them: what its tests share is built once.
NUM_TEST_PROCESSES ?= 2
TEST    = OMP_NUM_THREADS=1 $(BIN)/pytest
BY_FILE = -n $(NUM_TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# The first Python of 3.12 or newer that can make a virtual environment, 3.12 before newer ones. pyenv's versions
# are looked up by path, since its shims fail for a version that is not switched on. Override: make PYTHON=...
PYTHON ?= $(shell $(FIND_PYTHON))
CAN_RUN = -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
define FIND_PYTHON
	pyenv="$${PYENV_ROOT:-$$HOME/.pyenv}/versions"; \
	for python in python3.12 "$$pyenv"/3.12*/bin/python python3.13 python3.14 python3 "$$pyenv"/3.*/bin/python; do \
		if "$$python" $(CAN_RUN); then command -v "$$python"; break; fi; \
	done
endef
define NO_PYTHON
No Python of 3.12 or newer with its venv module was found on PATH or in pyenv.
  Debian, Ubuntu: apt install python3.12 python3.12-venv
  pyenv:          pyenv install 3.12
  or name one:    make PYTHON=/path/to/python3.12 ...
endef
export NO_PYTHON
NEED_PYTHON = [ -n "$(PYTHON)" ] || { echo "$$NO_PYTHON" >&2; exit 1; }

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup engine data smoke rl-smoke agents-smoke stages smoke-gpu test test-slow resharding context test-gpu test-engine faults crashes check lint types test-fast format pins python clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install everything into it; done once

engine: $(ENGINE)/.installed  ## make .venv-engine with vLLM for the CPU, to serve exported folders; 2.8 GB

smoke: $(STAMP) $(SMOKE)  ## train the shrunk model on real text, images and video, into runs/smoke
	rm -rf runs/smoke
	OMP_NUM_THREADS=1 $(BIN)/python -m launch.torchrun experiment=smoke

rl-smoke: $(STAMP) $(SUMS) $(SMOKE_RUN)  ## fine-tune the smoke run's model, then reinforce it with Toggle, into runs/rl_smoke
	rm -rf runs/rl_sft_smoke runs/rl_smoke
	OMP_NUM_THREADS=1 $(BIN)/python -m launch.torchrun experiment=rl_sft_smoke
	OMP_NUM_THREADS=1 $(BIN)/python -m launch.torchrun experiment=rl_smoke
	$(BIN)/python -m k25_train.rl.report runs/rl_smoke

agents-smoke: $(STAMP) $(AGENTS) $(SMOKE_RUN)  ## the same with tools in sandboxes and pictures, into runs/agents_smoke
	rm -rf runs/agents_sft_smoke runs/agents_smoke
	OMP_NUM_THREADS=1 $(BIN)/python -m launch.torchrun experiment=agents_sft_smoke
	OMP_NUM_THREADS=1 $(BIN)/python -m launch.torchrun experiment=agents_smoke
	$(BIN)/python -m k25_train.rl.report runs/agents_smoke

smoke-gpu: $(STAMP) $(SMOKE)  ## train the shrunk model on one GPU, in bfloat16 with Transformer Engine, into runs/smoke_1gpu
	rm -rf runs/smoke_1gpu
	$(BIN)/python -m k25_train.train experiment=smoke_1gpu $(OVERRIDES)

stages: $(STAMP) $(SMOKE) $(NEEDLES)  ## train every stage of the recipe, shrunk, one after another, into runs/stages
	OMP_NUM_THREADS=1 $(BIN)/python -m k25_train.recipes.stages $(OVERRIDES)

data: $(SMOKE)  ## build the smoke set into datasets/smoke, unless it is there

test: $(STAMP)  ## run the whole test suite but the slow and the GPU tests
	$(TEST) $(BY_FILE) -m "not gpu and not slow and not engine"

test-slow: $(STAMP)  ## run the slow tests
	$(TEST) -m "slow and not gpu and not engine"

resharding: $(STAMP)  ## resume a run in every change of its layout, with both optimizers
	$(TEST) tests/distributed/test_resharding.py

context: $(STAMP)  ## train 60 drawn layouts in which ranks share sequences like one process
	$(TEST) -s -k drawn tests/distributed/test_context_draws.py

test-gpu: $(STAMP)  ## run the tests that need GPUs: one, or two, four and eight over NCCL as far as there are
	$(TEST) -m gpu

test-engine: $(STAMP) $(ENGINE)/.installed  ## serve a small run with vLLM, put it to the tests of every engine and compare log-probabilities
	$(TEST) -m engine tests/engine

faults: $(STAMP)  ## disturb a running job on a real SLURM 40 times; needs slurm-wlm and munge
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.slurm_faults

crashes: $(STAMP)  ## crash jobs that save checkpoints 100 times, and look at what is left
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.checkpoint_crashes

check: lint  ## format, lint, types, import rules and the fast tests
	@$(MAKE) --no-print-directory --jobs 2 types test-fast

lint: $(STAMP)  ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)  ## check types
	$(BIN)/mypy k25_train parallel launch

test-fast: $(STAMP)  ## run the tests that need one process
	$(TEST) -q $(BY_FILE) -m "not gpu and not slow and not distributed" tests/unit

format: $(STAMP)  ## format the code and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pins: $(STAMP)  ## make docker/pins.lock, the hashes of what an image installs, from docker/pins.txt
	$(BIN)/python docker/lock.py

python:  ## print the Python that set-up uses
	@$(NEED_PYTHON); echo "$(PYTHON)"

clean:  ## remove set-up, builds and caches; datasets and runs stay
	rm -rf .venv $(ENGINE) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find k25_train parallel launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so a set-up that was interrupted is resumed; a sound .venv is kept.
$(STAMP): setup.py Makefile
	@$(BIN)/python $(CAN_RUN) && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(NEED_PYTHON); \
		echo "making .venv with $(PYTHON)"; \
		"$(PYTHON)" -m venv --clear .venv; \
	}
	@echo "installing into .venv; the first time, several gigabytes are downloaded"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# An environment of its own: vLLM wants an older transformers. PyTorch's wheel runs without CUDA's libraries.
$(ENGINE)/.installed: tests/engine/pins.txt tests/engine/vllm.txt docker/cuda_stubs.py
	@$(NEED_PYTHON); "$(PYTHON)" -m venv --clear $(ENGINE)
	@echo "installing vLLM into $(ENGINE); the first time, about a gigabyte is downloaded"
	@$(ENGINE)/bin/python -m pip install --quiet --no-deps --requirement tests/engine/pins.txt
	@$(ENGINE)/bin/python -m pip install --quiet --no-deps --require-hashes --requirement tests/engine/vllm.txt
	@lib=$$($(ENGINE)/bin/python -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')/lib; \
		$(ENGINE)/bin/python docker/cuda_stubs.py "$$lib" "$$lib" >/dev/null
	@touch $@

$(SMOKE): | $(STAMP)
	$(BIN)/python -m k25_train.data build

$(NEEDLES): $(SMOKE) | $(STAMP)
	$(BIN)/python -m k25_train.data needles

$(CHAT): $(SMOKE) | $(STAMP)
	$(BIN)/python -m k25_train.data chat

# What the shrunk model is fine-tuned on before it is reinforced.
$(SUMS): conf/environment/sums.yaml $(CHAT) | $(STAMP)
	$(BIN)/python -m k25_train.rl.demonstrations experiment=rl_smoke --out datasets/sums/demonstrations.jsonl
	$(BIN)/python -m k25_train.data index data=sums
	@touch $@

$(AGENTS): conf/environment/agents.yaml $(CHAT) | $(STAMP)
	$(BIN)/python -m k25_train.rl.demonstrations experiment=agents_smoke --out datasets/agents/demonstrations.jsonl
	$(BIN)/python -m k25_train.data index data=agents
	@touch $@

$(SMOKE_RUN):
	@$(MAKE) --no-print-directory smoke
