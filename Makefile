# Every command of the project. `make setup` comes first by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LABEL := .venv-label
LOWEST := .venv-lowest

.PHONY: setup setup-label demo dist generalist evaluate-shipped test test-slow test-label setup-lowest test-lowest lint check bench clean

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

# Two processes of one thread each: most of the tests are too small for more.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --durations 20

# The files that take longest come first, so that no process ends alone with one of them.
LONGEST := $(addprefix tests/test_,shipped_model.py demo.py hsp_sam_learns.py benchmarks.py)
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder --durations 20 \
		$(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/*/ tests/test_*.py))

# MONAI Label wants an older numpy, and so has an environment of its own; see requirements-label.txt.
$(LABEL)/.ready: requirements.txt requirements-label.txt
	test -x $(LABEL)/bin/python || $(PYTHON) -m venv $(LABEL)
	$(LABEL)/bin/pip install --quiet --upgrade pip
	$(LABEL)/bin/pip install --quiet --no-deps monailabel==0.8.5
	$(LABEL)/bin/pip install --quiet -r requirements-label.txt
	touch $@

setup-label: $(LABEL)/.ready

test-label: setup-label
	$(LABEL)/bin/python -m pytest apps/monailabel/tests

# Every `>=` of the requirements read as `==`: what is stated as the lowest version is what is tested.
$(LOWEST)/.ready: requirements.txt requirements-dev.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade pip
	sed 's/>=/==/' requirements.txt > $(LOWEST)/requirements.txt
	grep -E '^(hypothesis|jsonschema|pytest>|pytest-xdist)' requirements-dev.txt | sed 's/>=/==/' >> $(LOWEST)/requirements.txt
	$(LOWEST)/bin/pip install --quiet -r $(LOWEST)/requirements.txt
	touch $@

setup-lowest: $(LOWEST)/.ready

# Networks, losses and metrics, one training, the configs, the command line, and the published zip in an environment
# where this software is not installed; the rest of the suite takes too long twice.
test-lowest: setup-lowest
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile \
		tests/networks tests/losses tests/metrics tests/engines/test_training.py tests/engines/test_inferers.py \
		tests/engines/test_prompted_inferer.py tests/test_bundle.py tests/test_cli_prompts.py
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest tests/test_publishing.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The bundle as it is downloaded; docs/deploy.md.
dist: setup
	rm -rf dist
	$(BIN)/automedsam publish --output dist

# How the model that comes with the bundle was made, in five stages; docs/model.md. DATA is the folder of its data sets.
# OPTIONS="--max_epochs 1 --val_interval 1 --image_size 32" makes all of it small; a stage that broke off goes on from its
# last.pt.
DATA ?= data
GENERALIST ?= runs/generalist
SETS := kvasir_seg ph2_dermoscopy covid_chest_xray acdc_cine_mr lits_liver_ct chaos_t2_mr
EMPTY :=
COMMA := ,
LISTS = $(subst $(EMPTY) ,$(COMMA),$(strip $(SETS:%=$(GENERALIST)/data/%/datalist.json)))
STAGE = $(BIN)/automedsam train $(LISTS) $(if $(wildcard $(1)/last.pt),--resume $(1)/last.pt) --output $(1) --config \
	experiments/from_scratch.yaml,experiments/generalist.yaml

generalist: setup
	for set in $(SETS); do \
		$(BIN)/automedsam prepare shared --source $(DATA)/$$set --output $(GENERALIST)/data/$$set || exit 1; done
	$(call STAGE,$(GENERALIST)/start),experiments/encoder_start.yaml --max_epochs 28 --val_interval 7 $(OPTIONS)
	$(call STAGE,$(GENERALIST)/prompts),experiments/class_prompts.yaml --pretrained $(GENERALIST)/start/model.pt \
		--max_epochs 4 --val_interval 4 $(OPTIONS)
	$(call STAGE,$(GENERALIST)/joint),experiments/joint_tuning.yaml --pretrained $(GENERALIST)/prompts/model.pt \
		--max_epochs 9 --val_interval 9 $(OPTIONS)
	$(call STAGE,$(GENERALIST)/masks),experiments/joint_tuning.yaml,experiments/mask_tuning.yaml \
		--pretrained $(GENERALIST)/joint/model.pt --max_epochs 6 --val_interval 6 $(OPTIONS)
	$(call STAGE,$(GENERALIST)/details),experiments/detail_tuning.yaml --pretrained $(GENERALIST)/masks/model.pt \
		--max_epochs 24 --val_interval 8 $(OPTIONS)

# The figures of that model, compared with those in configs/metadata.json.
evaluate-shipped: setup
	$(BIN)/python benchmarks/shipped_model.py $(DATA)

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
	$(BIN)/python benchmarks/exports.py
	$(BIN)/pip install --quiet surface-distance
	$(BIN)/python benchmarks/surface_metrics.py
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/render.py

clean:
	rm -rf runs build dist eval .pytest_cache .mypy_cache .ruff_cache *.egg-info
