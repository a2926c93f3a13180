# Two commands matter: `make demo` and `make test`. Each does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check gate bench validate clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      distil a ViT on real digits (CPU: under 10 minutes), results in runs/demo;"
	@echo "               ARGS=--all compares all four methods (under 30 minutes), ARGS=--help says more"
	@echo "make test      run the tests"
	@echo "make check     lint and types"
	@echo "make gate      compile every kernel for every GPU target, full sweep (no GPU needed; an hour or more on two cores)"
	@echo "make bench     benchmarks on this machine's GPU"
	@echo "make validate  kernels against the reference on this machine"

# Where Python comes without venv (Debian's python3), virtualenv steps in.
$(READY): pyproject.toml
	"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)" && \
		"$(PYTHON)" -m pip install --quiet --target "$(VENV)-bootstrap" virtualenv && \
		PYTHONPATH="$(VENV)-bootstrap" "$(PYTHON)" -m virtualenv --quiet "$(VENV)"; }
	"$(BIN)/python" -m pip install --quiet --upgrade pip
	"$(BIN)/python" -m pip install --quiet --editable ".[dev]"
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

clean:
	rm -rf "$(VENV)" "$(VENV)-bootstrap" build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
