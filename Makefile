# Every target sets up .venv by itself. Variables:
#   PYTHON    the interpreter that makes .venv (3.11 or newer; default python3)
#   SECONDS   how long a soak takes (default 60)
#   PIP_ARGS  further arguments to pip, such as another index
PYTHON ?= python3
PIP_ARGS ?=
SECONDS ?= 60
export VENV ?= .venv
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-slow soak check format clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## set up .venv (the others do it when needed)

demo: $(STAMP) ## generate with a token tree: text, statistics, plain against tree
	@$(VENV)/bin/python -m benchmarks.demo

test: $(STAMP) ## everything CI runs: lint, types, tests
	@scripts/check
	@scripts/test

test-slow: $(STAMP) ## the tests that take minutes
	@scripts/test -m "slow and not gpu and not multigpu and not network"

soak: $(STAMP) ## a minute of hostile clients against a server (SECONDS=600 for longer)
	@scripts/soak --seconds $(SECONDS)

check: $(STAMP) ## lint, format, types and floors, without the tests
	@scripts/check

format: $(STAMP) ## mend what can be mended automatically
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

clean: ## remove .venv, caches and inflated models
	rm -rf $(VENV) twins results build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Re-made when what is asked for changes; otherwise free
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: '$(PYTHON)' is missing or older than Python 3.11; try: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "make: '$(PYTHON) -m venv' failed; it needs the venv and ensurepip modules" >&2; exit 2; }
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@
