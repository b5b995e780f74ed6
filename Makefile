PYTHON ?= python3
VENV ?= .venv
# `make test CONSTRAINTS=constraints.txt` installs exactly the versions that the tests last ran on.
CONSTRAINTS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
DEMO := digits_mrl digits_mrl_e digits_ff

.DEFAULT_GOAL := help
.PHONY: help demo notebooks test check ffcv clean-demo

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/ready-dev: requirements-dev.txt requirements-notebooks.txt $(VENV)/ready
	$(PIP) -r requirements-dev.txt
	touch $@

$(VENV)/ready-ffcv: requirements-ffcv.txt $(VENV)/ready
	$(PIP) -r requirements-ffcv.txt
	touch $@

ffcv: $(VENV)/ready-ffcv ## install FFCV, for data.backend ffcv; system packages first, see requirements-ffcv.txt

$(VENV)/ready-extras: requirements-extras.txt $(VENV)/ready-dev
	$(PIP) -r requirements-extras.txt
	touch $@

demo: $(VENV)/ready ## install, train five models on handwritten digits, evaluate them, draw the paper's figure (CPU, minutes)
	for name in $(DEMO); do $(BIN)/python train.py --config $$name.yaml --run.resume auto || exit; done
	for dim in 8 32; do $(BIN)/python train.py --config digits_ff.yaml --head.nesting_list "[$$dim]" \
		--run.name digits_ff$$dim --run.resume auto || exit; done
	$(BIN)/python eval.py --runs runs/digits_mrl runs/digits_mrl_e runs/digits_ff runs/digits_ff8 runs/digits_ff32 \
		--out runs/digits_eval

notebooks: demo ## the demo, then the notebooks executed on its runs, in place
	$(PIP) -r requirements-notebooks.txt
	$(BIN)/python notebooks/execute.py

clean-demo: ## remove the demo's runs
	rm -rf runs/digits_mrl runs/digits_mrl_e runs/digits_ff runs/digits_ff8 runs/digits_ff32 runs/digits_eval

test: $(VENV)/ready-dev ## install, then run the tests on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/ready-extras ## ruff, mypy and the tests, those of the exports too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
