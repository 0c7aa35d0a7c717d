# make demo    set up .venv, train the example, measure this machine
# make test    set up .venv, run the tests
# make test-torch    install a wheel of what is built beside another torch and test it there
# make lint    formatters, linters and types, all pinned
# make docs    build the documentation in build/site (compiles nothing, needs no torch)
# make clean   remove everything that the above made
#
# PYTHON picks the interpreter (make demo PYTHON=python3.12). On Linux torch from PyPI is the CUDA
# build, of some gigabytes; for the smaller CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_OTHER ?= torch==2.10.0
BUILD_DEPS := setuptools==84.2.1 wheel==0.48.0 pybind11==3.1.0 ninja==1.13.2
EXTRAS := bench,examples,test,lint

OTHER := build/other
OTHER_TESTS ?= ops layers torch_contract ragged attention attention_modules variants
# Instruction sets are a matter of the binary, not of torch.
OTHER_FLAGS ?= -q -k "not instruction_set"

BIN := $(VENV)/bin
# Where torch finds ninja; without it the extension is built without, one file at a time.
export PATH := $(abspath $(BIN)):$(PATH)
SOURCES := $(shell find csrc -type f)
FORMATTED := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES) $(shell find tests -type f))

.PHONY: demo test test-torch lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/python examples/sentiment.py
	$(BIN)/python examples/translate.py --short
	$(BIN)/python examples/recurrent_policy.py --short
	$(BIN)/fused-rnn-bench quick

test: $(VENV)/.built
	$(BIN)/pytest $(PYTEST_FLAGS)

# An environment that has nothing but the wheel, what the wheel asks for and what the tests need.
test-torch: $(VENV)/.built
	$(BIN)/python tests/wheel.py build/wheel
	$(BIN)/python -m venv --clear $(OTHER)
	$(OTHER)/bin/python -m pip install $(TORCH_OTHER) "$$(echo build/wheel/*.whl)[test]" pybind11
	cd $(OTHER) && bin/fused-rnn-bench doctor
	$(OTHER)/bin/pytest $(OTHER_FLAGS) "tests/test_docs.py::test_python[README.md]" \
	  $(OTHER_TESTS:%=tests/test_%.py)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

# Read from files or from a server, the pages fetch nothing from elsewhere.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	! grep -rnoE --include='*.html' '<(script|link|img|iframe|object)[^>]*(src|href|data)="?(https?:)?//[^ >]*' build/site
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info fused_rnn/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or later is needed, this is " + v + ": set PYTHON")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: the extension is built against the torch that is installed, and without
# build isolation nothing fetches another.
$(VENV)/.torch: Makefile | $(BIN)/python
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install $(BUILD_DEPS)
	touch $@

# Compiles everything, in a folder that setuptools throws away.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/python -m pip install --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

# After a change in csrc ninja compiles what is out of date, its objects in build/ (all of them the
# first time). --force makes setuptools leave that choice to ninja.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	if [ -n "$$(find csrc -type f -newer $(VENV)/.installed)" ]; then \
	  $(BIN)/python setup.py build_ext --inplace --force; \
	fi
	touch $@

# The docs extra without the package, which would be compiled: pages come from sources alone.
$(VENV)/.docs: Makefile pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $$(sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
	touch $@
