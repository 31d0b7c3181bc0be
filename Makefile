# `make demo` and `make test` set up everything from a bare clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export OMP_NUM_THREADS ?= 2
# Threads that wait by spinning bring a shared machine to a halt; ours sleep.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM := false

RESULTS := build/results
ROWS := -r int8 -r int4-inverse -r neumann-int8

.PHONY: demo results test lint clean
demo: $(READY)
	$(BIN)/qdeltanet demo --output build/demo --overwrite

# The comparison in full: searches a recipe for each embedded model, then evaluates. Goes on where it was cut off.
results: $(READY)
	$(BIN)/qdeltanet search tiny-recall --output $(RESULTS)/searched-recall.yaml
	$(BIN)/qdeltanet search tiny-hybrid --output $(RESULTS)/searched-hybrid.yaml
	$(BIN)/qdeltanet evaluate tiny-recall --tasks recall $(ROWS) -r $(RESULTS)/searched-recall.yaml \
	  --cache $(RESULTS)/cache --json $(RESULTS)/tiny-recall.json --markdown $(RESULTS)/tiny-recall.md \
	  --csv $(RESULTS)/tiny-recall.csv
	$(BIN)/qdeltanet evaluate tiny-hybrid --tasks bytes $(ROWS) -r $(RESULTS)/searched-hybrid.yaml \
	  --cache $(RESULTS)/cache --json $(RESULTS)/tiny-hybrid.json --markdown $(RESULTS)/tiny-hybrid.md \
	  --csv $(RESULTS)/tiny-hybrid.csv

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone: with it in place no other package pulls a build with CUDA.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
