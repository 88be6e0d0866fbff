# A fresh machine needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
# glibc keeps freed memory instead of returning it after every step: a tenth of a CPU step's time.
export MALLOC_TRIM_THRESHOLD_ ?= 4000000000
export MALLOC_MMAP_THRESHOLD_ ?= 4000000000

.PHONY: help install install-dev quickstart test test-full check docs bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[local,look,text]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/.installed  ## a virtual environment with layerfuse

install-dev: $(VENV)/.installed-dev  ## the same with the tools for development

quickstart: install  ## two small pretrained models, a study of four arms, a report
	$(BIN)/layerfuse models pull dinov2-small smollm2-135m-instruct
	$(BIN)/layerfuse study recipes/quickstart.yaml

test: install-dev  ## the tests
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow'

test-full: install-dev  ## the tests, with every combination
	$(BIN)/python -m pytest -n auto --dist worksteal

check: install-dev  ## ruff, pyright, import order of the floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: install-dev  ## write the generated pages of docs/
	$(BIN)/python -m docs.generate

bench: install-dev  ## benchmarks, as ratios of two things timed in one run
	for file in benchmarks/[a-z]*.py; do PYTHONPATH=. $(BIN)/python $$file || exit 1; done

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
