# `make demo` and `make test` need Linux, Python 3.11 or newer, pip, make and gcc; they install the rest into .venv.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STORAGE ?= ppc-storage

.PHONY: setup demo test test-hosts soak bench test-fast check docs screenshots debian clean
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[ray,mlflow,s3,search,timm,coco,docs,dev]" --constraint constraints.txt
	touch $@

demo: setup ## generate the data, run the study of K, print its table
	$(BIN)/ppc study launch experiments/scenes_k.yaml --storage $(STORAGE) --max-concurrent 2

test: setup check ## everything: linters, then all tests
	PPC_ALL_EXTRAS=1 $(BIN)/python -m pytest

test-hosts: setup ## a cluster of two hosts made of network namespaces, with kills and a cut cable (root, 8 minutes)
	$(BIN)/python -m pytest -m hosts

soak: setup ## 60 trials under random kills of their processes and of the launch (half an hour)
	$(BIN)/python -m pytest -m soak -s

bench: setup ## what is measured on CPUs, as ratios in one run; bench/RESULTS.md keeps what was measured
	$(BIN)/python bench/contrast.py
	$(BIN)/python bench/seam.py
	$(BIN)/python bench/curve.py
	$(BIN)/python bench/walks.py
	$(BIN)/python bench/pcm.py
	$(BIN)/python bench/crf.py
	$(BIN)/python bench/inference.py
	$(BIN)/python bench/inputs.py
	$(BIN)/python bench/overhead.py
	$(BIN)/python bench/many.py

test-fast: setup ## without the tests that start Ray or take long
	$(BIN)/python -m pytest -m "not ray and not slow and not hosts and not soak"

check: setup ## ruff, mypy, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

debian: ## Debian's Chromium and TeX, for the tests of pages and of the LaTeX table, which else are skipped (root)
	apt-get install -y -q --no-install-recommends chromium chromium-driver texlive-latex-base texlive-latex-recommended

screenshots: setup ## docs/img/mlflow_*.png and report*.png, from generated numbers
	PPC_SCREENSHOTS=docs/img $(BIN)/python -m pytest tests/test_browser.py

docs: setup ## the site, from docs/ and the config models, into site/; open site/index.html
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) site build *.egg-info
