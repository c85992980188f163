# `make demo` trains and evaluates a policy on this machine; `make test` runs the tests. Both only need python3 >= 3.11.
PYTHON ?= python3
BIN = .venv/bin
RUN = $(HOME)/runs/vfp_tabletop

.PHONY: demo test test-all lint format

demo: .venv/runtime
	$(BIN)/accelerate launch -q train_vfp.py --config configs/vfp_single_expert/tabletop/train.yaml
	$(BIN)/python evaluate.py --checkpoint $(RUN) --env tabletop --episodes 100 --nfe 1 2 4 10

test: .venv/dev
	$(BIN)/python -m pytest

test-all: .venv/dev
	$(BIN)/python -m pytest -m "slow or not slow"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/runtime: requirements-lock.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python >= 3.11 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-lock.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(BIN)/pip install -q -c requirements-lock.txt -r requirements-dev.txt
	touch $@
