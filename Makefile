# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs; a second run is fast.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
PYTEST_ARGS ?= -n auto --dist worksteal

.PHONY: demo test lint types format gen gen-check bench build conformance constraints clean setup

demo: $(VENV)/.ready
	$(BIN)/interceptors demo $(DEMO_ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

lint: $(VENV)/.ready $(VENV)-gen/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(VENV)-gen/bin/buf lint

types: $(VENV)/.ready
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Generated code is committed; its generator has an environment of its own, as its versions are older on purpose.
$(VENV)-gen/.ready: tools/requirements-gen.txt
	$(PYTHON) -m venv $(VENV)-gen
	$(VENV)-gen/bin/python -m pip install --quiet --requirement tools/requirements-gen.txt
	touch $@

gen: $(VENV)-gen/.ready
	PATH="$(abspath $(VENV)-gen/bin):$$PATH" buf generate

gen-check: gen
	@test -z "$$(git status --porcelain -- interceptors/gen)" || \
	  { git status --short -- interceptors/gen; echo "interceptors/gen is stale: run 'make gen' and commit it"; exit 1; }

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

conformance: $(VENV)/.ready $(VENV)-gen/.ready
	GEN_PYTHON=$(VENV)-gen/bin/python $(BIN)/python tests/conformance/run.py $(CONFORMANCE_ARGS)

build: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

constraints:
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-emit-index-url --no-header \
	  --no-annotate --upgrade -o constraints.txt

clean:
	rm -rf .venv* dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
