# make demo, make test: each makes its own environment in .venv and needs only Python >= 3.11, git, make and a package index.
PYTHON ?= python3
BIN := .venv/bin
# MLX's Linux wheel carries a slow BLAS of its own: use OpenBLAS where the system has it.
BLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0))
WITH := $(if $(BLAS),LD_PRELOAD=$(BLAS))
RUN := $(WITH) $(BIN)/python -m
# What `make quick` runs: the algorithm, the prefix, texts, the commands' words.
QUICK := tests/generation/test_sampler.py tests/generation/test_settings.py tests/generation/test_noise.py \
	tests/model/test_attention.py tests/model/test_cache.py tests/text/test_tokenizer.py tests/text/test_gate.py \
	tests/pipeline/test_pipeline.py tests/commands/test_conventions.py tests/test_habits.py
# What needs neither torch nor transformers' models nor mlx-vlm: the package with the oldest dependencies it allows.
ALONE := tests/commands tests/text/test_tokenizer.py tests/text/test_gate.py tests/terminal tests/test_tour.py \
	tests/pipeline/test_pipeline.py tests/pipeline/test_offline.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo quick test lint bench soak floors clients
demo: .venv/demo
	$(RUN) mlx_diffgemma.generate

quick: lint
	$(RUN) pytest $(QUICK)

test: lint
	$(RUN) pytest

lint: .venv/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright && $(BIN)/lint-imports

bench: .venv/demo
	$(RUN) mlx_diffgemma.bench

soak: .venv/test
	$(RUN) benchmarks.soak
	$(RUN) benchmarks.kills
	$(RUN) benchmarks.serve_soak

# Clients that are no Python packages: those of Node and agents, by npm (1.2 GB); a browser (Debian's chromium, or what
# CHROMIUM names).
clients: .venv/clients
	$(BIN)/python -m pytest tests/clients

floors: .venv/floors
	$(WITH) .venv/floors/bin/python -m pytest $(ALONE)

# Another Python than the environment's, when one is named: it is made anew.
ifneq ($(origin PYTHON),file)
OTHER := $(shell [ "`$(BIN)/python -V 2>&1`" = "`$(PYTHON) -V 2>&1`" ] || echo other)
endif

.PHONY: $(if $(OTHER),.venv/demo)
.venv/demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, and \
	$(PYTHON) is `$(PYTHON) -V 2>&1`. Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Making .venv and installing MLX and the package: a minute or two, about 300 MB …"
	@$(PYTHON) -m venv $(if $(OTHER),--clear) .venv && $(BIN)/python -m pip install -q -e '.[server]' && touch $@

.venv/test: .venv/demo
	@echo "Installing what the tests compare with (PyTorch, transformers, mlx-vlm): some minutes …"
	@$(BIN)/python -m pip install -q -e '.[test]' && touch $@

.venv/clients: .venv/test tests/clients/package.json
	@$(BIN)/python -m pip install -q -e '.[clients]' && npm install --silent --no-package-lock --prefix tests/clients && touch $@

.venv/floors: .venv/demo
	$(BIN)/python -m pip install -q uv && $(BIN)/uv venv -q --python $(BIN)/python $@
	$(BIN)/uv pip install -q --python $@/bin/python --resolution lowest-direct -e . 'pytest>=9' 'hypothesis>=6.100'
