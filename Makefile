PYTHON ?= python3
VENV ?= .venv
# `make test CONSTRAINTS=constraints.txt` installs exactly the versions that the tests last ran on.
CONSTRAINTS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

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

demo: $(VENV)/ready ## install, train 15 small models on handwritten digits, evaluate, draw the paper's figure (CPU, minutes)
	$(BIN)/python -m experiments.reproduce --grid experiments/grids/digits.yaml --runs runs/digits --jobs 2
	$(BIN)/python -m mrl.explore --run runs/digits/mrl_seed0

notebooks: $(VENV)/ready ## train two models on handwritten digits, and execute the notebooks on them, into runs/notebooks
	$(PIP) -r requirements-notebooks.txt
	for name in digits_mrl digits_ff; do $(BIN)/python train.py --config $$name.yaml --run.resume auto || exit; done
	$(BIN)/python eval.py --runs runs/digits_mrl runs/digits_ff --out runs/digits_eval
	$(BIN)/python notebooks/execute.py

clean-demo: ## remove the demo's runs
	rm -rf runs/digits

test: $(VENV)/ready-dev ## install, then run the tests on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/ready-extras ## ruff, mypy and the tests, those of the exports too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
