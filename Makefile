# `make demo` and `make test` set everything up by themselves; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
NATIVE := $(shell find csrc -name '*.c' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install demo test package-test wheel docs lint format bench gpu-check clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

# Debian ships python3 without venv; virtualenv from PyPI then does the same without root.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bdfast needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV) && \
	  $(PYTHON) -m pip install --quiet --target $(VENV)-bootstrap virtualenv && \
	  PYTHONPATH=$(VENV)-bootstrap $(PYTHON) -m virtualenv $(VENV); }

$(INSTALLED): $(BIN)/python pyproject.toml setup.py $(NATIVE)
	$(BIN)/python -m pip install --quiet 'torch>=2.11' torchvision 'setuptools>=77' ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev,docs]'
	@# pip does not show what the build has left out.
	@$(BIN)/bdfast doctor
	@touch $@

install: $(INSTALLED) ## Virtual environment, dependencies, native build

demo: $(INSTALLED) ## Train a backdoored network, clean it, write demo-output/report.html
	$(BIN)/bdfast demo

test: $(INSTALLED) ## The test suite, with coverage
	$(BIN)/pytest -n auto --ignore=tests/packaging --cov --cov-report=term --cov-fail-under=97 --durations=10

package-test: $(INSTALLED) ## Build the sdist and the wheel, install it elsewhere and try it there
	$(BIN)/pytest -n auto tests/packaging --durations=10

docs: $(INSTALLED) ## The documentation, into site/; a broken link is an error
	@# With --quiet it would neither show nor count warnings, and --strict would find nothing.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(INSTALLED) ## A wheel in dist/, for this platform where the native kernels are in it
	$(BIN)/python -m pip wheel --verbose --no-build-isolation --no-deps --wheel-dir dist .

lint: $(INSTALLED) ## ruff, mypy, import-linter, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(filter-out %.c,$(NATIVE))

format: $(INSTALLED) ## Format everything in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter-out %.c,$(NATIVE))

bench: $(INSTALLED) ## Timings against the published way of doing it
	$(BIN)/python -m bench

gpu-check: $(BIN)/python ## On a machine with a GPU: build, test and time everything there
	$(BIN)/python -m pip install --quiet 'torch>=2.11' torchvision 'setuptools>=77' ninja
	BDFAST_CUDA=1 $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	BDFAST_REQUIRE=gpu,cpu,cuda,triton $(BIN)/pytest -m gpu -rs
	BDFAST_BENCH_DEVICE=cuda $(BIN)/python -m bench.gpu_times
	BDFAST_BENCH_DEVICE=cuda $(BIN)/python -m bench -k "test_op or test_step"
	BDFAST_BENCH_DEVICE=cuda BDFAST_BACKEND=triton $(BIN)/python -m bench -k "test_op or test_step"

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) $(VENV)-bootstrap build dist site *.egg-info bdfast/_C*.so demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
