# Two commands to begin with: `make run` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCKS := infra/locks
STAGE ?= dev
PROFILES = $(shell $(BIN)/python -c 'import boto3; print(boto3.Session().region_name or "")' 2>/dev/null)
# Found when it is first needed, and then known.
REGION ?= $(eval REGION := $(or $(AWS_REGION),$(AWS_DEFAULT_REGION),$(PROFILES),us-east-1))$(REGION)
DEPLOYERS := infra/node_modules/.bin
AWS = AWS_REGION=$(REGION) AWS_DEFAULT_REGION=$(REGION)

.DEFAULT_GOAL := help
.PHONY: help run test lint check bench prices matrix locks clean
.PHONY: package synth deploy deploy-cdk secrets admin-key remove capacity deployers

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.local  ## serve on http://127.0.0.1:8080, with a first key printed
	@$(BIN)/python -m functions.local --demo

test: $(VENV)/.dev $(VENV)/.cdk tests/engines/.installed infra/node_modules/.installed  ## set up everything and run all tests
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

check: lint test  ## all that CI checks

bench: $(VENV)/.dev tests/engines/.installed package  ## beside the bare provider: CPU, added latency, starts, memory, size
	@$(BIN)/python -m tests.bench

package:  ## dist/lightrail.zip: what Lambda runs; by python3.13 or uv
	@if python3.13 -c '' 2>/dev/null; then python3.13 infra/package.py; \
	  elif command -v uv >/dev/null; then uv run --no-project --python 3.13 infra/package.py; \
	  else $(PYTHON) infra/package.py; fi

synth: package deployers $(VENV)/.cdk  ## both deployers' templates, in dist/: no AWS account needed
	@$(DEPLOYERS)/osls package --stage $(STAGE) --region $(REGION) --package dist/osls
	@CDK_CONTEXT_JSON='{"stage": "$(STAGE)"}' CDK_OUTDIR=dist/cdk $(BIN)/python infra/cdk_app.py
	@echo "dist/osls/cloudformation-template-update-stack.json  dist/cdk/lightrail-$(STAGE).template.json"

deploy: package deployers $(VENV)/.local  ## put a stage on AWS by Serverless: make deploy STAGE=dev REGION=us-east-1
	@$(DEPLOYERS)/osls package --stage $(STAGE) --region $(REGION) --package dist/osls
	@$(AWS) $(DEPLOYERS)/osls deploy --stage $(STAGE) --region $(REGION) --package dist/osls
	@$(AWS) $(BIN)/python infra/stage.py show $(STAGE)

deploy-cdk: package deployers $(VENV)/.cdk  ## the same by the CDK; a stage belongs to the deployer that made it
	@$(AWS) $(DEPLOYERS)/cdk deploy --app "$(BIN)/python infra/cdk_app.py" --output dist/cdk --no-notices \
	  --require-approval never --context stage=$(STAGE) || { \
	  echo "If it says that the environment is not bootstrapped: $(DEPLOYERS)/cdk bootstrap aws://<account>/$(REGION)"; exit 1; }
	@$(AWS) $(BIN)/python infra/stage.py show $(STAGE)

secrets: $(VENV)/.local  ## give a stage the provider keys that .env and the environment have
	@$(AWS) $(BIN)/python -m functions.cli --stage $(STAGE) secrets push

admin-key: $(VENV)/.local  ## make an admin key of a stage, shown once
	@$(AWS) $(BIN)/python -m functions.cli --stage $(STAGE) keys create --name admin --role admin

remove: $(VENV)/.local  ## take a stage off AWS; its table and secrets stay, unless EVERYTHING=yes
	@$(AWS) $(BIN)/python infra/stage.py remove $(STAGE) $(if $(filter yes,$(EVERYTHING)),--everything)

capacity: $(VENV)/.local  ## what a load costs and where limits bite: make capacity LOAD='--rate 5 --seconds 10'
	@$(BIN)/python infra/capacity.py $(LOAD)

prices: $(VENV)/.dev  ## refresh shared/prices.json from the genai-prices release that is locked
	@$(BIN)/python infra/refresh_prices.py

matrix: $(VENV)/.dev  ## write shared/providers/MATRIX.md: which parameter each provider takes
	@$(BIN)/python -m shared.capabilities

locks: $(VENV)/.dev  ## pin every dependency again, with hashes
	@sh $(LOCKS)/relock.sh $(BIN)/uv

clean:  ## remove what the other targets made; keys and database stay
	rm -rf $(VENV) dist infra/node_modules tests/engines/node_modules tests/engines/.installed
	rm -rf .pytest_cache .ruff_cache .hypothesis

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

# The CDK's library, half a gigabyte; it runs on Node.
$(VENV)/.cdk: $(LOCKS)/cdk.txt | $(VENV)/.dev
	@if command -v node >/dev/null; then echo "Installing the CDK (about a minute) ..."; \
	  $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r $< && touch $@; fi

# Serverless and the CDK's command; without npm the tests that need them say so and skip.
infra/node_modules/.installed: infra/package-lock.json
	@if command -v npm >/dev/null; then echo "Installing the deployers ..."; \
	  npm ci --prefix infra --silent --no-audit --no-fund && touch $@; fi

deployers: infra/node_modules/.installed
	@test -e $< || { echo "Deploying needs Node.js 22 or newer with npm: https://nodejs.org"; exit 1; }
