# The same commands as CI; scripts/test.sh is the one place that knows how to run them.
.DEFAULT_GOAL := help
PYTHON := $(or $(RLPROMPT_VENV),.venv)/bin/python
.PHONY: help setup quickstart check test test-fast test-gpu docs size

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## make the environment with everything a developer needs
	bash scripts/setup.sh dev

quickstart:  ## learn a prompt from nothing
	bash scripts/quickstart.sh

check: ## lint and types
	bash scripts/test.sh --check

test:  ## lint, types, all tests
	bash scripts/test.sh

test-fast:  ## lint, types, the quick tests
	bash scripts/test.sh --fast

test-gpu: setup  ## only the tests that need a GPU
	$(PYTHON) -m pytest -m "gpu or multi_gpu" -ra --durations=10

docs:  ## build the site of docs/ into site/
	bash scripts/docs.sh

size:  ## lines per file, longest functions
	$(PYTHON) scripts/size.py
