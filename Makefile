# The commands of this project; `make help` lists them. Each makes the environment it needs, once:
# a stamp file inside says that it is complete, and is older than the files it was made from only when those change.
#
#   make test ARGS="-k anderson -x"       arguments for pytest (or for the demo, or the benchmark)
#   make demo PYTHON=python3.12           another interpreter, when .venv does not exist yet
#
# On Linux, PyPI's torch is a CUDA build of several GB. The CPU build is enough for everything here:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
ARGS ?=

VENV := .venv
BENCH_VENV := .venv-bench
DOCS_VENV := .venv-docs
STAMP := $(VENV)/.installed
BENCH_STAMP := $(BENCH_VENV)/.installed
DOCS_STAMP := $(DOCS_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test notebook lint bench bench-rings bench-sim bench-rnn bench-attention bench-gpu docs docs-serve install clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## train an implicit model on real data, offline, in under a minute
	$(VENV)/bin/idl demo $(ARGS)

test: $(STAMP)  ## run the whole test suite, doctests included
	$(VENV)/bin/python -m pytest --numprocesses auto $(ARGS)

notebook: $(STAMP)  ## run introduction.ipynb from top to bottom; the file stays as it is
	$(VENV)/bin/python -m pytest --nbmake introduction.ipynb $(ARGS)

lint: $(STAMP)  ## ruff (rules and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(BENCH_STAMP)  ## measure speed and accuracy beside two public libraries and an MLP
	$(BENCH_VENV)/bin/python benchmarks/implicit_model.py $(ARGS)

bench-rings: $(BENCH_STAMP)  ## measure solvers where each unit reads few others: rings, chains, trees
	$(BENCH_VENV)/bin/python benchmarks/few_neighbours.py $(ARGS)

bench-sim: $(BENCH_STAMP)  ## measure SIM's row solver beside others
	$(BENCH_VENV)/bin/python benchmarks/sim.py $(ARGS)

bench-rnn: $(BENCH_STAMP)  ## measure ImplicitRNN beside torchidl's, nn.GRU and nn.RNN
	$(BENCH_VENV)/bin/python benchmarks/implicit_rnn.py $(ARGS)

bench-attention: $(BENCH_STAMP)  ## measure implicit attention beside explicit attention
	$(BENCH_VENV)/bin/python benchmarks/attention.py $(ARGS)

bench-gpu: $(BENCH_STAMP)  ## measure all models on an NVIDIA GPU, beside the peers and explicit layers
	$(BENCH_VENV)/bin/python benchmarks/gpu.py $(ARGS)

# Material's notice about the next major version of mkdocs, which is not installed here, is switched off.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS_STAMP)  ## build the documentation into site/; a broken link or reference is an error
	$(DOCS_VENV)/bin/mkdocs build --strict

docs-serve: export NO_MKDOCS_2_WARNING := 1
docs-serve: $(DOCS_STAMP)  ## show the documentation at http://127.0.0.1:8000, rebuilt when a file changes
	$(DOCS_VENV)/bin/mkdocs serve

install: $(STAMP)  ## make the environment .venv and nothing else

clean:  ## remove environments, caches and builds (runs/ stays)
	rm -rf $(VENV) $(BENCH_VENV) $(DOCS_VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# $(call make_venv,FOLDER): an empty environment, unless it is there already with the same command still working.
define make_venv
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
		echo "error: '$(PYTHON)' not found. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1), and this project needs Python 3.10 or newer."; \
		echo "       Name a newer one: make PYTHON=/path/to/python3"; \
		exit 1; }
	@test -x $(1)/bin/python -a -x $(1)/bin/pip || $(PYTHON) -m venv --clear $(1)
endef

$(STAMP): pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

$(BENCH_STAMP): pyproject.toml constraints.txt benchmarks/requirements.txt
	$(call make_venv,$(BENCH_VENV))
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --requirement benchmarks/requirements.txt
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-deps torchidl==0.0.4 torchdeq==0.1.0
	@touch $@

# The requirements of the extra alone: with the library's own, torch would be installed to build pages that never import it.
$(DOCS_STAMP): pyproject.toml constraints.txt
	$(call make_venv,$(DOCS_VENV))
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(DOCS_VENV)/bin/python -c "from importlib.metadata import requires; \
		print(*(line.split(';')[0] for line in requires('implicit-deep-learning') if 'docs' in line.split('extra ')[-1]), \
		sep='\n')" > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --requirement $(DOCS_VENV)/requirements.txt
	@touch $@
