# Every target sets itself up in .venv. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
SUITE ?= data
WORKERS ?= 3
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint test-faults test-readers bench bench-gpu gpu-day full-size doctor clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv/installed  ## run the whole pipeline on the built-in corpus, from data to report
	$(BIN)/python -m pipeline run --config demo

test: .venv/installed slurm-here chromium-here onnx-here  ## run all tests, on WORKERS (3: many wait) processes (20 minutes on 2 quiet cores)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: .venv/installed  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-faults: .venv/installed slurm-here  ## kill and damage runs for FAULT_SECONDS a test: SUITE=data|engine|training|evaluation|slurm
	$(BIN)/python -m pytest tests/faults/test_$(SUITE).py -m faults --timeout 2400 -s

test-readers: .venv/installed  ## read exports of all families with ONNX Runtime and other transformers, which it fetches into .readers
	$(BIN)/python -m tests.readers.environments
	$(BIN)/python -m pytest tests/readers tests/unit/test_export.py -m 'readers or not readers'

bench: .venv/installed  ## measure against named baselines, on a CPU
	$(BIN)/python -m pipeline.bench kernels --device cpu
	$(BIN)/python -m pipeline.bench checkpoint
	$(BIN)/python -m pipeline.bench step
	$(BIN)/python -m pipeline.bench data

full-size: .venv/installed  ## run T5-large and mT5-large all the way on a CPU, and every family into its folders: 24 GiB of memory, 40 GiB of disk, an hour
	$(BIN)/python -m pipeline.bench full-size --model t5-large
	$(BIN)/python -m pipeline.bench full-size --model mt5-large
	$(BIN)/python -m pipeline.bench families

bench-gpu: .venv/installed  ## run the tests and benchmarks that need an NVIDIA GPU; one that fails stops no other
	-$(BIN)/pip install -q --disable-pip-version-check --no-deps liger-kernel orda-kernel accelerate psutil  # baselines; left out where they do not install
	status=0; $(BIN)/python -m pytest -m gpu || status=1; \
	for loss in hidden head attention; do \
	  $(BIN)/python -m pipeline.bench kernels --device cuda --only $$loss --write pipeline/bench/results || status=1; \
	done; \
	$(BIN)/python -m pipeline.bench step --part gpu --write pipeline/bench/results || status=1; exit $$status

gpu-day: .venv/installed  ## learn what a CPU cannot tell, in six minutes of one NVIDIA GPU: DRY=1 tries it anywhere
	$(BIN)/python -m pipeline.bench gpu-day $(if $(DRY),--dry,--write pipeline/bench/results)

doctor: .venv/installed  ## check this machine: packages, ranks, MPI, kernels
	$(BIN)/python -m pipeline doctor

clean:  ## remove the virtual environment and the runs
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first: DeepSpeed's set-up imports it; DS_BUILD_OPS=0: its C++ and CUDA ops are not needed; this project last and
# in place, so that its commands run in any folder
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $$(grep -oE '^torch==[0-9.]+' requirements.txt) numpy setuptools wheel ninja packaging
	DS_BUILD_OPS=0 $(BIN)/pip install -q --disable-pip-version-check --no-build-isolation $$(grep -oE '^deepspeed==[0-9.]+' requirements.txt)
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# the SLURM tests run a real controller; without root they skip (and fail in CI)
.PHONY: slurm-here
slurm-here:
	@command -v slurmctld >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null; } \
		|| echo "no SLURM here: its tests are skipped (Debian: apt-get install slurm-wlm munge)"

# the report's page is tested in a browser; without root that test skips (and fails in CI)
.PHONY: chromium-here
chromium-here:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "no Chromium here: the test of the report's page is skipped (Debian: apt-get install chromium)"

# exports for ONNX Runtime are tested with it; nothing else needs its packages
.PHONY: onnx-here
onnx-here: .venv/installed
	@$(BIN)/python -m tests.readers.environments onnx || echo "no ONNX here: the tests of its exports are skipped"
