# Two commands matter: `make demo` and `make test`. Each does its own set-up in .venv, from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test check gate bench validate lock matrix clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      distil a ViT on real digits (CPU: under 10 minutes), results in runs/demo;"
	@echo "               ARGS=--all compares all four methods (under 30 minutes), ARGS=--help says more"
	@echo "make test      run the tests"
	@echo "make check     lint and types"
	@echo "make gate      compile every kernel for every GPU target, full sweep (no GPU needed; an hour or more on two cores)"
	@echo "make bench     benchmarks on this machine's GPU"
	@echo "make validate  kernels against a float64 oracle on this machine"
	@echo "make matrix    kernels and capture with the oldest, middle, locked and newest torch, Triton and timm (20 GB, an hour)"
	@echo "make lock      renew requirements.lock, the packages of make demo and make test"

# Where Python comes without venv (Debian's python3), virtualenv steps in. Every package that follows, pip and the build
# backend too, is the one in the lock: what works today works next year. Compiling all that comes takes as long as fetching it; Python
# compiles what is imported, once.
$(READY): requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("attnkd needs Python 3.10 or newer, $(PYTHON) is " \
		+ sys.version.split()[0] + "; choose another with: make PYTHON=python3.12 ...")'
	"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)" && \
		"$(PYTHON)" -m pip install --quiet --target "$(VENV)-bootstrap" virtualenv==21.15.11 && \
		PYTHONPATH="$(VENV)-bootstrap" "$(PYTHON)" -m virtualenv --quiet "$(VENV)"; }
	"$(BIN)/python" -m pip install --quiet --no-compile --require-hashes --requirement requirements.lock
	"$(BIN)/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch "$(READY)"

demo: $(READY)
	"$(BIN)/python" -m attnkd demo $(ARGS)

# One thread a process: the workers share the cores.
test: $(READY)
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n auto --maxprocesses 4 --dist worksteal

check: $(READY)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

gate: $(READY)
	"$(BIN)/python" -m benchmarks aot --full

bench: $(READY)
	"$(BIN)/python" -m benchmarks run

validate: $(READY)
	"$(BIN)/python" -m attnkd validate

# The newest packages that pyproject.toml allows, in one file for Python 3.10 to 3.13 on every system. The compiler alone is chosen
# by hand, together with benchmarks/results/aot: the code that it makes is part of what the tests assert.
COMPILER := "torch==2.14.*" "torchvision==0.29.1; python_version < '3.15'" "triton==3.8.*"
lock: $(READY)
	printf '%s\n' $(COMPILER) | "$(BIN)/uv" pip compile pyproject.toml --extra dev --constraints - --upgrade --quiet \
		--universal --python-version 3.10 --generate-hashes \
		--custom-compile-command "make lock" --output-file requirements.lock

# Oldest, middle, locked and newest versions of torch, Triton and timm, each in its own environment below .matrix.
matrix: $(READY)
	"$(BIN)/python" -m benchmarks matrix $(ARGS)

clean:
	rm -rf "$(VENV)" "$(VENV)-bootstrap" .matrix build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
