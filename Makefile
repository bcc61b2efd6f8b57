# One screen: what a user or CI can do here. `make` lists it; CONTRIBUTING.md says more.
# Options: PYTHON=python3.12  TORCH=cpu (PyTorch's own CPU wheel, about 0.2 GB, instead of the default build)
#          DEMO_FLAGS="--model DIR"  SUITES="unit contract"  UCX_PY_FLAGS="--source DIR-OR-URL"
PYTHON ?= python3
TORCH ?= default
DEMO_FLAGS ?=
SUITES ?=
UCX_PY_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: help setup demo demo-wide protos check test test-nightly test-ucx-py bench-smoke bench-peers up clean
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 20

setup: $(STAMP) ## install everything into .venv (the other targets do it too)
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@command -v git >/dev/null || { echo "needs git: apt-get install -y git make python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "needs venv: apt-get install -y git make python3-venv"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) show torch >/dev/null 2>&1 || { echo "about to download into $(VENV) and pip's cache: PyTorch $(TORCH_VERSION) and about 50 small packages (0.1 GB)."; \
	  if [ "$(TORCH)" = cpu ]; then echo "PyTorch: its own CPU wheel, about 0.2 GB"; \
	  else echo "PyTorch: the package index's build; on Linux x86-64 that is the CUDA build, about 3 GB. No GPU? TORCH=cpu takes 0.2 GB"; fi; }
	@# TORCH=cpu: only torch itself comes from that host, everything else from the ordinary index
	@if [ "$(TORCH)" = cpu ]; then $(PIP) install -q --no-deps --index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch; fi
	$(PIP) install -q --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## the main job: real prompts through prefill, store and decode, checked token for token
	$(BIN)/snowskin demo $(DEMO_FLAGS)

demo-wide: $(STAMP) ## as demo, with two nodes and 2 + 2 engines, and its goals must hold
	$(BIN)/snowskin demo --nodes 2 --prefill 2 --decode 2 --strict $(DEMO_FLAGS)

up: $(STAMP) ## a whole cluster on this host, until Ctrl-C
	$(BIN)/snowskin up

protos: $(STAMP) ## regenerate proto/snowskin/v1/*_pb2*
	$(BIN)/python -m snowskin.tools.protos

check: $(STAMP) ## format, lint, types, layers, generated code, Dockerfile and compose file: no tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m snowskin.tools.protos --check
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; else echo "NO HADOLINT FOR THIS PLATFORM: Dockerfile not linted"; fi

test: check ## check, then every suite in order with its seconds
	$(BIN)/python -m snowskin.tools.suites $(SUITES)

test-nightly: check ## as test, with the soak tests; their numbers go to docs/results
	NIGHTLY_RESULTS=docs/results HYPOTHESIS_PROFILE=soak $(BIN)/python -m snowskin.tools.suites --nightly $(SUITES)

test-ucx-py: $(STAMP) ## nightly: build ucx-py 0.45 from its source into .venv, and test the transport ucx on it
	$(BIN)/python -m snowskin.tools.ucx_py $(UCX_PY_FLAGS)
	$(BIN)/python -m pytest -q tests/contract tests/unit/transport tests/fault -k "ucx or ucp"

bench-smoke: $(STAMP) ## run every benchmark once, briefly: does it work, not how fast
	$(BIN)/python -m snowskin.tools.bench smoke

bench-peers: $(STAMP) ## other systems for `bench transfer --peers-python .venv/peers/bin/python`: 0.4 GB, and libibverbs1 libnuma1 libcurl4
	$(BIN)/python -m venv $(VENV)/peers
	$(VENV)/peers/bin/python -m pip install -q --no-deps -r tools/bench/transfer/peers.txt

clean: ## remove the caches; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find transport kvstore engines tools proto tests -name __pycache__ -type d -prune -exec rm -rf {} +
