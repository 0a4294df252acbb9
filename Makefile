# Every command of the project. `make setup` comes first by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slow lint check bench clean

# The stamp is newer than both lists of requirements once everything is installed.
$(VENV)/.ready: requirements.txt requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements-dev.txt
	$(BIN)/pip install -qq --no-deps --editable .
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(BIN)/automedsam demo

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The bundle checks of MONAI's model zoo, by its own commands.
check: setup
	$(BIN)/python -m pytest tests/test_bundle.py

# Time and memory; results go to benchmarks/results/.
bench: setup
	$(BIN)/python benchmarks/preparing.py
	$(BIN)/python benchmarks/encoders.py
	$(BIN)/python benchmarks/whole_slice.py
	$(BIN)/python benchmarks/inferring.py
	$(BIN)/python benchmarks/encoding_once.py
	$(BIN)/python benchmarks/hsp_sam.py
	$(BIN)/pip install --quiet surface-distance
	$(BIN)/python benchmarks/surface_metrics.py
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/render.py

clean:
	rm -rf runs build dist eval .pytest_cache .mypy_cache .ruff_cache *.egg-info
