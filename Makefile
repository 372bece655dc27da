# Everything here sets up .venv by itself; `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

# The first supported Python on the machine; `make test PYTHON=python3.12` picks another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
# Two workers, because a test session holds about 2 GB and the smallest machine has 2 cores.
PYTEST_ARGS ?= -n 2
OUT ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
CREATED := $(VENV)/.created
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PINS := pyproject.toml requirements.lock
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test lint format lock venv clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: $(RUNTIME)  ## From raw text to a Llama 2 that speaks, and answers questions, and learns from preferences, on 2 cores (report in runs/demo)
	@$(BIN)/llama-jax demo --out $(OUT)

test: lint  ## Lint, then run the whole suite
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(DEV)  ## Check style and format with ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(DEV)  ## Let ruff fix what it can
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

venv: $(DEV)  ## Set up .venv with the tools for development

# The PyTorch that .ci/run installs. A suffix such as +cpu is cut from the pins, so that any build of that version satisfies them.
TORCH := torch==2.13.0
lock:  ## Write requirements.lock anew: the newest versions that pyproject.toml allows
	@rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	@echo "resolving into $(VENV)-lock, some minutes" >&2
	@$(VENV)-lock/bin/python -m pip install -q --disable-pip-version-check -e '.[dev,torch]' '$(TORCH)'
	@{ echo "# Versions tested together, for pip install -c. Written by make lock on $$($(PYTHON) -V)."; \
	   $(VENV)-lock/bin/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9]+$$//'; } > requirements.lock
	@rm -rf $(VENV)-lock

clean:  ## Remove .venv and caches (runs/ stays)
	@rm -rf $(VENV) $(VENV)-lock build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find llama_jax tests experiments bench tpu_setup -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps rather than the files themselves, so that what was interrupted is done again.
$(CREATED):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 found; install one or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "creating $(VENV) with $$($(PYTHON) -V)" >&2
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(RUNTIME): $(PINS) | $(CREATED)
	@echo "installing llama_jax and its dependencies into $(VENV), about a minute" >&2
	@$(PIP) install -q -c requirements.lock -e .
	@touch $@

# The compiler for GPUs has a folder of its own: beside jax it would tell every process that there is no driver.
$(DEV): $(PINS) $(RUNTIME) | $(CREATED)
	@echo "installing the development tools into $(VENV)" >&2
	@$(PIP) install -q -c requirements.lock -e '.[dev]'
	@jaxlib=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)'); \
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/cuda jax-cuda12-plugin==$$jaxlib jax-cuda12-pjrt==$$jaxlib
	@touch $@
