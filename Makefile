# Everything a person does with a checkout. `make` alone lists the targets.

# The interpreter that creates .venv.
PYTHON ?= python3
# What pip installs as PyTorch. On Linux the default may bring the CUDA libraries (several GB); where there is no
# GPU, give a CPU build instead: a wheel on disk, or `make TORCH="torch==2.13.0 --index-url <PyTorch's CPU index>"`.
# Read when .venv is created: to change it later, `make distclean` first.
TORCH ?= torch==2.13.0
# The interpreter of the Triton server's environment, 3.10 to 3.12: the server needs NumPy 1, which newer ones lack.
SERVER_PYTHON ?= $(PYTHON)
# Options of `make serve`, as SERVE="--grpc-port 9001".
SERVE ?=
# How many tests run at a time, each on one thread.
JOBS ?= 2
# Where the demo and the demo's training write.
OUT ?= out

VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python
SERVER := .venv-triton
SERVER_INSTALLED := $(SERVER)/.installed
# tritonserver runs there alone; elsewhere its tests are skipped.
SERVED := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(SERVER_INSTALLED))
# A file stays on one process: what its tests share (an exported bundle, a trained model) is made once.
# Bytecode is kept, whatever the environment says: making the tests' takes each process 7 seconds.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=10

.DEFAULT_GOAL := help
.PHONY: help install demo train-demo serve test test-slow test-kernels test-gpu lint types kernels docs dist clean distclean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20
	@echo "Settings: PYTHON=$(PYTHON)  TORCH=\"$(TORCH)\"  JOBS=$(JOBS)  OUT=$(OUT)"
	@echo "          SERVER_PYTHON=$(SERVER_PYTHON)  SERVE=\"$(SERVE)\""

install: $(INSTALLED)  ## create .venv with everything that the other targets need

$(INSTALLED): setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	    echo "make: $(PYTHON) was not found: install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: dagan-rt needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1): name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: $(PYTHON) cannot create environments: on Debian or Ubuntu run apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing $(TORCH) and the other packages into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet $(TORCH)
	@$(RUN) -m pip install --quiet --editable ".[dev]"
	@touch $@

$(SERVER_INSTALLED): setup.py pyproject.toml
	@command -v $(SERVER_PYTHON) >/dev/null && \
	    $(SERVER_PYTHON) -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || { \
	    echo "make: the Triton server needs Python 3.10 to 3.12 with venv, $(SERVER_PYTHON) is none: name one: make SERVER_PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing Triton Inference Server and the other packages into $(SERVER) (a minute the first time)"
	@$(SERVER_PYTHON) -m venv $(SERVER)
	@$(SERVER)/bin/python -m pip install --quiet --editable ".[triton-server,openvino]"
	@touch $@

demo: $(INSTALLED)  ## animate a portrait with the demo weights; results in out/
	$(RUN) -m dagan_rt.demo --out $(OUT)

train-demo: $(INSTALLED)  ## train the demo weights afresh; results in out/train-demo/ (hours on a CPU)
	$(RUN) -m dagan_rt train --recipe train/recipes/demo.toml --out $(OUT)/train-demo

serve: $(INSTALLED) $(SERVER_INSTALLED)  ## serve the demo weights with Triton Inference Server, until Ctrl-C
	@mkdir -p $(OUT)
	@test -e $(OUT)/repository || $(RUN) -m dagan_rt.export --checkpoint train/demo/model.pth.tar --depth train/demo/depth \
	    --recipe triton-cpu --out $(OUT)/repository
	@$(RUN) -m dagan_rt triton serve $(OUT)/repository --python $(SERVER)/bin/python $(SERVE)

test: lint types  ## lint, types, and every test that is neither slow nor needs a GPU
	$(PYTEST) -m "not slow and not gpu"

# pytest exits with 5 when it selects no test, which is no failure here.
test-slow: $(INSTALLED) $(SERVED)  ## the tests that take minutes or install packages
	$(PYTEST) -m "slow and not gpu" || test $$? -eq 5

test-kernels: $(INSTALLED)  ## compile and check the CUDA kernels for every architecture, where test-slow takes some
	DAGAN_RT_TEST_ARCHITECTURES=all $(PYTEST) -m "not gpu" tests/kernels/test_build.py

test-gpu: $(INSTALLED)  ## the tests that need an NVIDIA GPU
	$(PYTEST) -m gpu || test $$? -eq 5

lint: $(INSTALLED)  ## ruff: rules, and the form of Python, in Markdown too
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(INSTALLED)  ## mypy
	$(RUN) -m mypy

kernels: $(INSTALLED)  ## compile the CUDA kernels with nvcc to kernels/fatbin/, which `make dist` then ships
	$(RUN) -m dagan_rt.kernels build

docs: $(INSTALLED)  ## build the documentation; open out/docs/index.html
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet --builder html --doctree-dir $(OUT)/.doctrees docs $(OUT)/docs
	@echo "wrote $(OUT)/docs/index.html"

dist: $(INSTALLED)  ## build the wheel and the source distribution into dist/
	rm -rf build dist dagan_rt.egg-info
	$(RUN) -m build --no-isolation

clean:  ## delete what builds, tests and checks leave behind (not .venv, .venv-triton or out/)
	rm -rf build dist kernels/fatbin .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./$(SERVER) -prune -o -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## clean, and delete .venv and .venv-triton
	rm -rf $(VENV) $(SERVER) dagan_rt.egg-info
