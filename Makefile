# Each target sets up what it needs; a second call reuses .venv.
PYTHON ?= python3
KAGGLE_PYTHON ?= python3.12
VENV := .venv/bin/python
NEEDS := import sys; sys.exit(sys.version_info < (3, 11))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test bench bench-fast evidence flower flower-chaos flower-test gpu hospitals kaggle-test oracle-test privacy render lint

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile | expand -t 20

demo: .venv/.installed  ## run the four notebooks on synthetic films: no GPU, no network
	@$(VENV) -m fedutils run --profile demo

test: .venv/.installed  ## run the tests
	@$(VENV) -m pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder

bench: .venv/.bench  ## run the longer proofs, and measure every promised ratio beside its peers
	@$(VENV) -m pytest -m slow
	@$(VENV) tests/bench/bench.py

bench-fast: .venv/.bench-fast  ## the fast half of the measurements, without Flower
	@$(VENV) tests/bench/bench.py --fast

evidence: .venv/.installed  ## compare federated, centralised and local training, with intervals
	@$(VENV) tests/bench/evidence.py

flower: .venv/.flower  ## train the phantom's scanners over a real network, and compare
	@$(VENV) tests/bench/flower.py

flower-chaos: .venv/.flower  ## kill, cut and fill up such a network for ten rounds, and compare
	@$(VENV) tests/bench/chaos.py

flower-test: .venv/.flower
	@$(VENV) -m pytest -m 'not slow' -n 2 tests/network tests/privacy/test_masks.py

oracle-test: .venv/.oracle  ## compare labels with TorchXRayVision's readers, cell by cell
	@$(VENV) -m pytest tests/films/test_presets.py

gpu: .venv/.installed  ## measure what only a GPU can show; writes work/gpu.json
	@$(VENV) tests/bench/gpu.py

hospitals: .venv/.installed  ## run five data sets as downloaded, drawn, alone and as five hospitals
	@$(VENV) tests/bench/hospitals.py

privacy: .venv/.installed  ## measure what differential privacy costs, and what a lying client does
	@$(VENV) tests/bench/privacy.py

kaggle-test: .venv-kaggle/.installed  ## run the four kernels on the versions that Kaggle has
	@.venv-kaggle/bin/python -m pytest tests/notebooks/test_on_kaggle.py

render: .venv/.installed  ## execute the demo as the committed notebooks/*.ipynb
	@$(VENV) -m fedutils render

lint: .venv/.installed  ## check style
	@$(VENV) -m ruff check . && $(VENV) -m ruff format --check .

.venv-kaggle/.installed: tests/notebooks/kaggle.txt
	@$(KAGGLE_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { echo 'This needs Python 3.12: make kaggle-test KAGGLE_PYTHON=/path/to/python3.12' >&2; exit 1; }
	@$(KAGGLE_PYTHON) -m venv .venv-kaggle
	@.venv-kaggle/bin/python -m pip install -q -r $<
	@touch $@

.venv/.flower: .venv/.installed
	@$(VENV) -m pip install -q -e '.[flower]'
	@touch $@

.venv/.oracle: .venv/.installed
	@$(VENV) -m pip install -q -e '.[oracle]'
	@touch $@

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c '$(NEEDS)' 2>/dev/null || { echo 'This needs Python 3.11+: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'Installing into .venv (once) ...'
	@$(PYTHON) -m venv .venv
	@$(VENV) -m pip install -q -r requirements.txt
	@$(VENV) -m pip install -q -e '.[test]'
	@touch $@

.venv/.bench .venv/.bench-fast: .venv/.bench%: .venv/.installed
	@$(VENV) -m pip install -q -e '.[bench$*]'
	@touch $@
