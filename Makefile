# A fresh machine needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
VENV_LMMS ?= .venv-lmms
VENV_SERVING ?= .venv-serving
# That of SGLang 0.5.23, and within what vLLM 0.33 asks for (>=5.16.1,<5.21).
SERVING = transformers==5.19.0
# What looks for pages that some cannot read or operate. Fetched, not kept here: its licence is MPL-2.0.
AXE_VERSION = 4.14.1
AXE = .cache/axe-core-$(AXE_VERSION)
PIP_LMMS = $(VENV_LMMS)/bin/python -m pip --disable-pip-version-check
PIP_SERVING = $(VENV_SERVING)/bin/python -m pip --disable-pip-version-check
# glibc keeps freed memory instead of returning it after every step: a tenth of a CPU step's time.
export MALLOC_TRIM_THRESHOLD_ ?= 4000000000
export MALLOC_MMAP_THRESHOLD_ ?= 4000000000

# What a server loads: models, processors, and what they are exported to.
SERVED_TESTS = tests/test_model.py tests/test_generation.py tests/test_processor.py \
	tests/test_stock_models.py tests/test_encoder.py tests/test_export_llava.py \
	tests/test_export_hub.py tests/test_serving_contract.py tests/test_given_model.py \
	tests/test_import.py tests/test_ordinary_paths.py tests/test_export_gguf.py \
	tests/test_start_from.py tests/test_other_runtimes.py tests/test_likelihood.py

.PHONY: help .cache/axe-core install install-dev quickstart test test-full test-lmms test-serving check-serving test-browser check-browser check docs bench clean

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

test: install-dev  ## the tests; those of pages are in test-browser
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow and not browser'

test-full: install-dev  ## the tests, with every combination
	$(BIN)/python -m pytest -n auto --dist worksteal

# An environment of its own: lmms-eval asks for some fifty packages, most of which its evaluator
# does without.
$(VENV_LMMS)/.installed: pyproject.toml constraints.txt $(wildcard tests/lmms/*.txt)
	$(PYTHON) -m venv $(VENV_LMMS)
	$(PIP_LMMS) install --quiet --constraint constraints.txt --requirement tests/lmms/requirements.txt
	$(PIP_LMMS) install --quiet --constraint constraints.txt --editable .
	$(PIP_LMMS) install --quiet --no-deps --requirement tests/lmms/no-deps.txt
	touch $@

test-lmms: $(VENV_LMMS)/.installed  ## the tests of the plug-in of lmms-eval, in .venv-lmms
	$(VENV_LMMS)/bin/python -m pytest tests/lmms

# The other versions stay; those that transformers itself asks for follow it.
$(VENV_SERVING)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_SERVING)
	grep -vE '^(transformers|tokenizers|huggingface-hub)==' constraints.txt > $(VENV_SERVING)/constraints.txt
	$(PIP_SERVING) install --quiet --constraint $(VENV_SERVING)/constraints.txt '$(SERVING)' --editable '.[dev]'
	touch $@

test-serving: $(VENV_SERVING)/.installed  ## the tests with the transformers of servers, in .venv-serving
	$(VENV_SERVING)/bin/python -m pytest -n auto --dist worksteal -m 'not slow and not browser'

check-serving: $(VENV_SERVING)/.installed  ## those of models and exports alone
	$(VENV_SERVING)/bin/python -m pytest -n auto --dist worksteal -m 'not slow' $(SERVED_TESTS)

.cache/axe-core: $(AXE)/axe.min.js

$(AXE)/axe.min.js:
	mkdir -p $(AXE)
	cd $(AXE) && npm pack --silent axe-core@$(AXE_VERSION)
	tar -xzmf $(AXE)/axe-core-$(AXE_VERSION).tgz -C $(AXE) --strip-components=1 package/axe.min.js
	rm $(AXE)/axe-core-$(AXE_VERSION).tgz

test-browser: install-dev $(AXE)/axe.min.js  ## the tests of pages, in chromium, which must be there
	BROWSER_TESTS=required $(BIN)/python -m pytest tests/browser

check-browser: install-dev  ## the tests of pages, where there is a browser
	$(BIN)/python -m pytest tests/browser

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
	rm -rf .cache $(VENV) $(VENV_LMMS) $(VENV_SERVING) .pytest_cache .ruff_cache build dist
