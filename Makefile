# Each target sets up what it needs; a second call reuses .venv.
PYTHON ?= python3
VENV := .venv/bin/python
NEEDS := import sys; sys.exit(sys.version_info < (3, 11))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test bench flower flower-test render lint

help:  ## print this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile | expand -t 16

demo: .venv/.installed  ## run the four notebooks on synthetic films: no GPU, no network
	@$(VENV) -m fedutils run --profile demo

test: .venv/.installed  ## run the tests
	@$(VENV) -m pytest -m 'not slow' -n 2 --dist loadfile

bench: .venv/.installed  ## run the longer proofs
	@$(VENV) -m pytest -m slow

flower: .venv/.flower  ## train the phantom's scanners over a real network, and compare
	@$(VENV) -m fedutils flower demo

flower-test: .venv/.flower
	@$(VENV) -m pytest tests/test_flower.py tests/test_network.py

render: .venv/.installed  ## execute the demo as the committed notebooks/*.ipynb
	@$(VENV) -m fedutils render

lint: .venv/.installed  ## check style
	@$(VENV) -m ruff check . && $(VENV) -m ruff format --check .

.venv/.flower: .venv/.installed
	@$(VENV) -m pip install -q -e '.[flower]'
	@touch $@

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c '$(NEEDS)' 2>/dev/null || { echo 'This needs Python 3.11+: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'Installing into .venv (once) ...'
	@$(PYTHON) -m venv .venv
	@$(VENV) -m pip install -q -r requirements.txt
	@$(VENV) -m pip install -q -e '.[test]'
	@touch $@
