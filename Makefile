# make demo        set up .venv and run the whole job on real data
# make test        set up .venv with the development tools and run the tests
# make test-slow   the long tests: kills, stress, installs
# make test-shapes the tensor rooms' tests with shapes and types checked at every call
# make lint        ruff and mypy
#
# PYTHON=python3.12 picks another interpreter, EXTRAS=gpu the CUDA build of FAISS.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS ?= cpu
VENV   ?= .venv
RUN    ?= run

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt

.PHONY: demo test test-slow test-shapes lint setup setup-dev clean

demo: $(VENV)/.installed
	$(BIN)/curate demo -o $(RUN)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow

test-shapes: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "not slow" tests/kernels tests/scorers \
	  --jaxtyping-packages=curate.kernels,curate.scorers,beartype.beartype

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/types $(BIN)/mypy

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

# The build runs in the environment itself, so the pinned setuptools does it.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing curate and what it needs into $(VENV): some minutes the first time"
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation -e '.[$(EXTRAS),dev]'
	@mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/curate  # mypy follows no import hook
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "curate needs Python 3.11 or later; name one with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
