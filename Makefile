# make demo   install if needed, then the whole pipeline on a rendered world (minutes, CPU)
# make test   install if needed, then the tests, by two processes (ARGS=-n0: by one; ARGS="-n0 tests/towers" some of them)
# make test-all   those too that are marked slow: more points of a kill, more launchers, more kinds of tower through the compiler
# make lint   formatting and lint, as CI wants them

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle OpenMP threads sleep instead of spinning, so that training and its data workers can share few cores.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-all lint format clean

demo: $(STAMP)
	$(BIN)/python scripts/quickstart.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed; set PYTHON=...') if sys.version_info < (3, 10) else None"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,serve,eval,dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) demo_output build *.egg-info
