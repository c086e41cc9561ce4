# `make demo` and `make test` install what they need; everything else is a part of one of them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
PINNED := pyproject.toml constraints.txt
DEMO ?= runs/demo

.PHONY: help demo test test-fast test-newest check format clean

help:
	@echo "make demo         install, evaluate the scripted baselines, write $(DEMO)/report.html"
	@echo "make test         install, run the whole default test suite"
	@echo "make test-fast    the tests that take no longer than a few seconds each"
	@echo "make test-newest  the env tests on the newest Gymnasium, in an environment of its own"
	@echo "make check        ruff and mypy"

# One command with every pin, so that torch is never chosen by a range.
$(VENV)/.core: $(PINNED)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c constraints.txt torch==2.13.0 -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP_INSTALL) -c constraints.txt torch==2.13.0 -e '.[dev,sb3,rllib]'
	@touch $@

# The newest Gymnasium needs neither torch nor ray for the envs, so this environment stays small.
$(VENV)-newest/.ready: $(PINNED)
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check \
		'gymnasium>=1.3,<2' numpy scipy opencv-python-headless pillow h5py pycocotools jinja2 rich typer matplotlib \
		pytest pytest-timeout hypothesis
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: $(VENV)/.core
	$(BIN)/medseg-gym evaluate --env MedSeg-Phantom-Nano-v0 \
		--policy Random --policy CentreClick --policy BoxOnce --policy OracleBoxThenClicks --policy OracleClicks \
		--cases 48 --restart --out $(DEMO)
	@echo "Now open $(DEMO)/report.html in a browser. To go on by hand: . $(BIN)/activate"

test: $(VENV)/.dev test-newest
	$(BIN)/python -m pytest

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-newest: $(VENV)-newest/.ready
	$(VENV)-newest/bin/python -c "import gymnasium; print('gymnasium', gymnasium.__version__)"
	$(VENV)-newest/bin/python -m pytest -q tests/test_env.py tests/test_vector.py tests/test_ids.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-newest runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
