# make demo, make test: each makes its own environment in .venv and needs only Python >= 3.11, git, make and a package index.
PYTHON ?= python3
BIN := .venv/bin
# MLX's Linux wheel carries a slow BLAS of its own: use OpenBLAS where the system has it.
BLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0))
RUN := $(if $(BLAS),LD_PRELOAD=$(BLAS)) $(BIN)/python -m

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench
demo: .venv/demo
	$(RUN) mlx_diffgemma.generate --pace 0.15

test: lint
	$(RUN) pytest

lint: .venv/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright && $(BIN)/lint-imports

bench: .venv/demo
	$(RUN) mlx_diffgemma.bench

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install -q -e . && touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install -q -e '.[test]' && touch $@
