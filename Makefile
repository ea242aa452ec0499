# Every target sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A machine without an NVIDIA GPU takes PyTorch's CPU build: 0.2 GB instead of 3 GB.
CPU_TORCH := torch==2.13.0+cpu
# Tests that run at once; each is a thread or two, and many wait.
JOBS ?= 3
# Hundreds of processes start here: what Python has compiled is kept.
export PYTHONDONTWRITEBYTECODE :=
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup test test-quick test-all test-gpu test-cuda-build check-published lint demo \
        photos from-zero clean

setup: $(VENV)/.done

$(VENV)/.done: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  echo "no NVIDIA GPU: installing the CPU build of PyTorch"; \
	  $(BIN)/pip install -q "$(CPU_TORCH)" 2>/dev/null \
	    || $(BIN)/pip install -q "$(CPU_TORCH)" --extra-index-url $(CPU_INDEX) \
	    || echo "no CPU build to be had: the next step installs the full one"; \
	fi
	$(BIN)/pip install -q -r requirements-dev.txt
	@touch $@

# Everything quick, and a short form of everything slow.
test: setup
	$(BIN)/python -m pytest -n $(JOBS) -m "not full"

test-quick: setup
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not full"

# Everything in full.
test-all: setup
	$(BIN)/python -m pytest -n $(JOBS)

# All that needs a GPU, in 8 minutes, into out/gpu_report.txt; uses the PyTorch of PYTHON.
test-gpu:
	$(PYTHON) tests/gpu/run.py $(GPU_FLAGS)

# Fake tensors on a CUDA build of PyTorch, in .venv-cuda: 3 GB to download, 6 GB on the disk.
test-cuda-build:
	$(PYTHON) tests/cuda_build/run.py

# Fetches the published weights of both generations (3 GB, into out/published) and checks them.
check-published: setup
	$(BIN)/python dataset/check_published.py $(CHECK_FLAGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell $$(git ls-files '*.py' '*.md' '*.toml' '*.txt' Makefile)

demo: setup
	$(BIN)/python trainer/demo.py

# Trains on real photos from nothing and scores it; PHOTO_FLAGS="--data FOLDER" names the photos.
photos: setup
	$(BIN)/python trainer/photos.py $(PHOTO_FLAGS)

# The whole chain with nothing but generated data and the committed tokenizer.
from-zero: setup
	$(BIN)/python trainer/demo.py --from_zero 1

clean:
	rm -rf $(VENV) .venv-cuda .venv-gpu .pytest_cache .ruff_cache
