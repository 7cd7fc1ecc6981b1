# Everything a newcomer or a CI machine needs, from nothing: each target sets up what it uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The versions that the project is tested with; PIP_ARGS= lets pip choose others.
PIP_ARGS ?= -c constraints.txt
RUNS ?= runs
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(SOURCES) $(shell find tests -name '*.cpp' -o -name '*.h' -o -name '*.c')
BUILD := setup.py pyproject.toml constraints.txt $(wildcard _build/*.py)

.DEFAULT_GOAL := help
.PHONY: help install demo test mutants gpu-evidence gpu-check check format bench wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) torch torchvision
	@touch $@

# `pip install` compiles the kernels against that torch.
$(VENV)/.installed: $(VENV)/.torch $(BUILD) $(SOURCES)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## virtual environment in .venv with the compiled package and the developer tools

demo: $(VENV)/.torch  ## train D-TRADES on 3,000 real digits, evaluate it beside a normal network, print the table
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) '.[demo]'
	@rm -f $(VENV)/.installed
	$(BIN)/dtrades-fast doctor
	$(BIN)/dtrades-fast train --method standard --arch resnet18 --preset quick --runs-dir $(RUNS) --run demo-standard --overwrite
	$(BIN)/dtrades-fast train --method dtrades --arch resnet18 --preset quick --runs-dir $(RUNS) --run demo-dtrades --overwrite
	$(BIN)/dtrades-fast evaluate $(RUNS)/demo-standard $(RUNS)/demo-dtrades --attacks fgsm,pgd20

test: $(VENV)/.installed  ## the whole test suite
	$(BIN)/python -m pytest

mutants: $(VENV)/.installed  ## every planted bug and mutant of the kernels, not the sample that `make test` takes
	$(BIN)/python -m pytest -s --all-mutants tests/mutants tests/simt/test_planted_bugs.py tests/ptx

gpu-evidence: $(VENV)/.installed  ## regenerate docs/gpu-evidence.md: what is known of the CUDA kernels without a GPU
	$(BIN)/python tests/ptx/evidence.py

gpu-check: $(VENV)/.installed  ## on a machine with a GPU: everything that only a GPU can show, in one report
	$(BIN)/python scripts/gpu_check.py

check: $(VENV)/.installed  ## lint, format and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: $(VENV)/.installed  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

bench: $(VENV)/.installed  ## time the operators against PyTorch (under 10 minutes), results in bench/results
	$(BIN)/dtrades-fast bench

wheel: $(VENV)/.torch  ## a wheel in dist/, for any Python >= 3.10 and any torch >= 2.13
	$(BIN)/python -m pip wheel --no-deps -w dist .

clean:  ## remove what builds leave behind (not the environment, not the runs)
	rm -rf build dist *.egg-info dtrades_fast/*.so dtrades_fast/_build_info.py $(VENV)/.installed
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
