# Two commands to begin with: `make run` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCKS := infra/locks

.DEFAULT_GOAL := help
.PHONY: help run test lint check bench prices locks clean

help:  ## what there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

run: $(VENV)/.local  ## serve on http://127.0.0.1:8080, with a first key printed
	@$(BIN)/python -m functions.local --demo

test: $(VENV)/.dev tests/engines/.installed  ## set up everything and run all tests
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

check: lint test  ## all that CI checks

bench: $(VENV)/.dev  ## this gateway beside the bare provider: CPU, added latency, start, memory
	@$(BIN)/python -m tests.bench

prices: $(VENV)/.dev  ## refresh shared/prices.json from the genai-prices release that is locked
	@$(BIN)/python infra/refresh_prices.py

locks: $(VENV)/.dev  ## pin every dependency again, with hashes
	@sh $(LOCKS)/relock.sh $(BIN)/uv

clean:  ## remove what the other targets made; keys and database stay
	rm -rf $(VENV) tests/engines/node_modules tests/engines/.installed .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Lightrail needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.local: $(LOCKS)/local.txt | $(VENV)/bin/python
	@echo "Installing what serving needs ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(VENV)/.dev: $(LOCKS)/dev.txt | $(VENV)/bin/python
	@echo "Installing what testing needs (about a minute) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@ $(VENV)/.local

# The local DynamoDB engine; without npm the tests that need it say so and skip.
tests/engines/.installed: tests/engines/package-lock.json
	@if command -v npm >/dev/null; then echo "Installing the local DynamoDB engine ..."; \
	  npm ci --prefix tests/engines --silent --no-audit --no-fund && touch $@; fi
