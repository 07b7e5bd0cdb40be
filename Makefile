# make env         the environment in .venv; does nothing when it is as locked
# make quickstart  the whole road at small size: real video to a generated, guarded, measured video (ARGS="--help")
# make test        linters and tests, the distributed ones among them (PYTEST_ARGS="-k word")
#
# PYTHON=python3.11    the interpreter to build .venv from (3.11 or newer)
# TORCH_INDEX=<url>    an extra package index for torch, where the default one has CUDA builds only

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

.PHONY: env quickstart test lint format clean-env

env:
	@$(PYTHON) requirements/install.py --venv $(VENV) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

quickstart: env
	$(BIN)/nemo-cosmos quickstart $(ARGS)

lint: env
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/lint-imports
	$(BIN)/python -m mypy

format: env
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

test: env lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean-env:
	rm -rf $(VENV)
