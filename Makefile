# `make` alone lists the targets.
PROFILE  ?= quick
DATASETS ?=
METHODS  ?=
SEEDS    ?=
SPLIT    ?=
JOBS     ?=
ENGINE   ?=
SCHEDULER ?=
REQUIRES ?=
DEVICE   ?=
FRESH    ?=
SOURCE   ?=
ARGS     ?=
PYTHON   ?= $(shell command -v python3.11 || command -v python3)

VENV  := .venv
PINS  := requirements.txt requirements-nodeps.txt
# Named after the content of the pins: file times mean nothing in a clone.
STAMP := $(VENV)/.installed-$(shell cat $(PINS) | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-16)
BIN   := $(VENV)/bin
OPTIONS = --profile "$(PROFILE)" $(if $(DATASETS),--datasets "$(DATASETS)") $(if $(METHODS),--methods "$(METHODS)") \
	$(if $(SEEDS),--seeds "$(SEEDS)") $(if $(SPLIT),--split "$(SPLIT)") $(if $(JOBS),--jobs $(JOBS)) \
	$(if $(DEVICE),--device $(DEVICE)) $(if $(FRESH),--fresh)

# Everything arrives with pip; after the installation nothing looks at the network.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export PYTHONPATH = $(CURDIR)
# Runs on a cluster, see docs/cluster.md.
export FOSTER_ENGINE = $(ENGINE)
export FOSTER_SCHEDULER = $(SCHEDULER)
export FOSTER_REQUIRES = $(REQUIRES)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install data reproduce-table1 reproduce-table2 reproduce-table3 reproduce-table4 reproduce-table5 \
	reproduce-table6 reproduce-table7 reproduce-figures reproduce-all site verify tune benchmark test test-unit test-notebooks lab lint clean

help:  ## this list
	@echo "FOSTER: dataset distillation for text-based sequential recommendation"; echo
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'
	@echo
	@echo "  options (2-core times): PROFILE=quick|cpu|paper|smoke  DATASETS=\"ml-100k foods\"  SEEDS=\"0 1 2\""
	@echo "                          METHODS=\"full random+labels foster\"|all  SPLIT=temporal  JOBS=2  DEVICE=cpu|cuda  FRESH=1"
	@echo "                          ENGINE=dask SCHEDULER=tcp://host:8786 REQUIRES=GPU=1 (docs/cluster.md)"
	@echo "  other data sets are read below the folder that FOSTER_DATA names, see README.md"

install: $(STAMP)  ## make .venv with all pinned packages (3 to 10 min, once)

$(STAMP):
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	@touch $@

data: $(STAMP)  ## DATASETS=games: official files (downloaded, or SOURCE=path) to the form that is read
	@test -n "$(DATASETS)" || { echo "error: name the data set, e.g. make data DATASETS=games, or see make data ARGS=--help DATASETS=games"; exit 2; }
	@$(BIN)/python -m foster_lib.prepare $(firstword $(DATASETS)) $(if $(SOURCE),--source $(SOURCE)) $(if $(FRESH),--overwrite) $(ARGS)

reproduce-table1: $(STAMP)  ## Table 1, statistics of the data sets at hand (about 20 s)
	@$(BIN)/python -m foster_lib.statistics $(if $(DATASETS),--datasets "$(DATASETS)") $(if $(SPLIT),--split "$(SPLIT)")

reproduce-table2: $(STAMP)  ## Table 2 on ML-100K from the data up (about 15 min, 2 cores; again: seconds)
	@$(BIN)/python -m foster_lib.reproduce table2 $(OPTIONS)
	@$(BIN)/python -c "from foster_lib.tables import table2_folder as f; print((f('$(PROFILE)', '$(SPLIT)') / 'table2.md').read_text())"

reproduce-table3: $(STAMP)  ## Table 3, what Table 2's finished runs cost (PROFILE=cpu: the published ones; under 1 min)
	@$(BIN)/python -m foster_lib.reproduce table3_efficiency $(OPTIONS)

reproduce-table4: $(STAMP)  ## Table 4, FOSTER with one part changed (2.6 h for 3 seeds, 2 cores; SEEDS=0: a third)
	@$(BIN)/python -m foster_lib.reproduce table4_ablation $(OPTIONS)

reproduce-table5: $(STAMP)  ## Table 5, other recommenders and encoders on the same sequences (about 40 min for 3 seeds, 2 cores)
	@$(BIN)/python -m foster_lib.reproduce table5_transfer $(OPTIONS)

reproduce-table6: $(STAMP)  ## Table 6, the baselines without their key ideas (1.7 h of one core for each seed; published: SEEDS=0)
	@$(BIN)/python -m foster_lib.reproduce table6_key_ideas $(OPTIONS)

reproduce-table7: $(STAMP)  ## Table 7, every way to make two sequences (estimated 3 h of one core for 3 seeds; SEEDS=0: a third)
	@$(BIN)/python -m foster_lib.reproduce table7_two_sequences $(OPTIONS)

reproduce-figures: $(STAMP)  ## all figures beside Table 2's (estimated 5 h for 3 seeds, 2 cores)
	@$(BIN)/python -m foster_lib.reproduce figures $(OPTIONS)

reproduce-all: $(STAMP)  ## all tables and figures, in order (about 5 h for 3 seeds, 2 cores; PROFILE=smoke: a trial)
	@$(BIN)/python -m foster_lib.reproduce all $(OPTIONS)

site: $(STAMP)  ## notebooks and tables as a static site in site/ (about a minute)
	@$(BIN)/python -m foster_lib.site

verify: $(STAMP)  ## are the published figures those of this code? a line per claim (about 5 min)
	@$(BIN)/python -m foster_lib.verify $(if $(DATASETS),--datasets "$(DATASETS)") $(if $(JOBS),--jobs $(JOBS)) $(if $(DEVICE),--device $(DEVICE))

tune: $(STAMP)  ## search on validation, of full data (ML-100K: about 10 min) or METHODS=foster
	@$(BIN)/python -m foster_lib.tune $(if $(DATASETS),--datasets "$(DATASETS)") $(if $(METHODS),--methods "$(METHODS)") $(if $(JOBS),--jobs $(JOBS)) $(if $(DEVICE),--device $(DEVICE))

benchmark: $(STAMP)  ## speed and memory as ratios, in results/benchmarks/ (PARTS=ranking: that one; about 30 min)
	@$(BIN)/python -m benchmarks $(PARTS) $(if $(DEVICE),--device $(DEVICE))

test: test-unit test-notebooks  ## unit tests, then all notebooks compared by nbval (about 8 min)

# Two processes of one thread each use two cores best; a notebook's cells stay together.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(JOBS),2) --dist loadfile

test-unit: $(STAMP)  ## unit tests only (about 4 min)
	@$(PYTEST) tests

test-notebooks: $(STAMP)  ## notebooks only (about 4 min)
	@$(PYTEST) --nbval-lax --nbval-current-env -p no:cacheprovider notebooks

lab: $(STAMP)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

lint: $(STAMP)  ## check style (seconds)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:  ## remove the environment and all caches; results stay
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache
