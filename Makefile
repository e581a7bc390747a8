# The commands of the project; `make` or `make help` lists them.
#   PY=python3.12       the interpreter .venv is made from
#   ORTHOFAST_EXT=1|0   native module required, or left out (default: built where a C++ compiler is found)
#   ARGS="-k pii"       more arguments for pytest or the benchmarks

PY ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BUILD := build
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
# tools of .venv serve where the system has none
export PATH := $(PATH):$(CURDIR)/$(VENV)/bin
HAS_NATIVE := import importlib.util as u; print("native_cpu,numba_cpu" if u.find_spec("orthofast._cpu") else "numba_cpu")

.DEFAULT_GOAL := help
.PHONY: help install ext demo test test-gpu lint bench bench-gpu docs lab wheel sanitize sanitize-thread clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP) ## make .venv with orthofast (editable), its native module and all tools

$(STAMP): pyproject.toml setup.py CMakeLists.txt requirements/constraints.txt requirements/peers.txt $(SOURCES)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "orthofast needs Python 3.11 or newer, $(PY) is none; choose one: make PY=python3.12 ..."; exit 1; }
	@test -x $(PYTHON) || $(PY) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PY) has no venv module (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m pip install -q --disable-pip-version-check -c requirements/constraints.txt -e '.[dev]'
	$(PYTHON) -m pip install -q --disable-pip-version-check --no-deps -r requirements/peers.txt
	@$(PYTHON) -c '$(HAS_NATIVE)' | sed 's/^/backends installed: /; s/$$/,reference/'
	@touch $@

# plain cmake recompiles only what changed; the full install takes all files again
ext: ## rebuild the native module after a change in csrc/
	@test -e $(STAMP) || $(MAKE) $(STAMP)
	cmake -S . -B $(BUILD)/dev -DPython_EXECUTABLE=$(abspath $(PYTHON)) -DORTHOFAST_CHECK=ON > /dev/null
	cmake --build $(BUILD)/dev --parallel
	cmake --install $(BUILD)/dev --prefix . > /dev/null
	@touch $(STAMP)

demo: install ## measure a real pretrained transformer: table, HTML report, JSON
	$(VENV)/bin/orthofast demo

test: install ## run the tests, the doctests and the examples of the documentation
	ORTHOFAST_REQUIRE=$${ORTHOFAST_REQUIRE:-$$($(PYTHON) -c '$(HAS_NATIVE)')} \
	  $(PYTHON) -m pytest --doctest-modules tests orthofast $(ARGS)

test-gpu: install ## run the tests that need a CUDA device, compute-sanitizer included where it is found
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("test-gpu needs a CUDA device; torch sees none")'
	$(PYTHON) -m pytest -m gpu tests $(ARGS)

bench-gpu: install ## check and time the GPU backends on this machine, under ten minutes
	PY=$(PYTHON) benchmarks/gpu_run.sh $(ARGS)

lint: install ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: install ## time the backends against other ways, on this machine
	$(PYTHON) -m benchmarks.run cpu $(ARGS)

docs: install ## build the manual into docs/_build
	$(PYTHON) -m sphinx -W -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

lab: install ## the papers' tables and figures: verdicts, figures, one page in lab/
	$(PYTHON) -m orthofast.lab $(ARGS)

wheel: install ## build the source distribution and the wheel into dist/
	$(PYTHON) -m build

sanitize: ## run the native fold under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B $(BUILD)/asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DORTHOFAST_MODULE=OFF -DORTHOFAST_CHECK=ON \
	  -DORTHOFAST_SANITIZE=address,undefined > /dev/null
	cmake --build $(BUILD)/asan --parallel
	$(BUILD)/asan/csrc_check

sanitize-thread: ## run it under ThreadSanitizer
	cmake -S . -B $(BUILD)/tsan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DORTHOFAST_MODULE=OFF -DORTHOFAST_CHECK=ON \
	  -DORTHOFAST_SANITIZE=thread > /dev/null
	cmake --build $(BUILD)/tsan --parallel
	$(BUILD)/tsan/csrc_check

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) $(BUILD) dist docs/_build demo lab *.egg-info orthofast/_cpu*.so orthofast/_cuda*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find orthofast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
