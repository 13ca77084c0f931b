PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
WORKERS ?= 2
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.ready-for-the-demo
CSRC = $(shell find csrc tests/emulator tests/sanitize -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help build demo test fuzz long mutants sanitize trust bench bench-compare experiments compare flower
.PHONY: wheel wheels matrix first-hour gpu-check docs lint format clean

help:    ## these targets
	@sed -n 's/^\([a-z-]*\): *[^#]*## /  make \1\t/p' Makefile

build: $(READY)    ## .venv with the pinned dependencies, and the compiled kernels in place
	@$(PY) setup.py -q build_ext --inplace

demo:    ## train on real data; options in ARGS: make demo ARGS="--help"
ifeq ($(and $(filter -h --help,$(ARGS)),$(if $(wildcard $(READY) $(DEMO_READY)),,nothing installed)),)
	@$(MAKE) --no-print-directory $(or $(wildcard $(READY)),$(DEMO_READY))
	@$(PY) setup.py -q build_ext --inplace
	@$(PY) -m lets_kernels demo $(ARGS)
else
	@cat docs/demo-options.txt
endif

test: build    ## the tests, by files in WORKERS processes (2); options for pytest in ARGS
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: build    ## thousands of random parameters for tests/ops/test_hypothesis.py, new ones each time; EXAMPLES=n for n
	LETS_KERNELS_EXAMPLES=$(or $(EXAMPLES),5000) $(PY) -m pytest tests/ops/test_hypothesis.py $(ARGS)

long: build    ## the tests of which `make test` runs a part, whole, and random calls; writes tests/results/long.json
	OMP_NUM_THREADS=1 $(PY) tests/support/run_at_length.py $(ARGS)

mutants: build    ## take the formulas apart one by one: does a test go red each time? Writes tests/results/mutants.json
	$(PY) tests/mutations/mutants.py $(ARGS)

bench-compare: build    ## host time of a step at the revision BASE and here, interleaved; BASE=main ARGS="--out FILE"
	$(PY) benchmarks/two_trees.py --base $(or $(BASE),$(error BASE=<revision> is missing)) $(ARGS)

bench: build    ## the benchmarks; ARGS="--save-results --wait 20" writes benchmarks/results
	$(PY) -m pytest benchmarks -q $(ARGS)

experiments: build    ## is there a radius that nobody has to search for? Hours, and goes on where it was; options in ARGS
	@$(PY) -m pip install -qq -r requirements-experiments.txt
	$(PY) -m benchmarks.experiments all $(ARGS)

compare: build    ## every method on the same tasks, beside SGD and the best SAM; writes docs/comparison.md; options in ARGS
	@$(PY) -m pip install -qq -r requirements-experiments.txt
	$(PY) -m benchmarks.experiments.compare $(ARGS)

flower: build    ## examples/federated_flower.py in an environment of its own, .venv-flower, and its test
	@test -x $(VENV)-flower/bin/python || $(PYTHON) -m venv $(VENV)-flower
	@$(VENV)-flower/bin/python -m pip install -qq -r requirements-flower.txt
	$(PY) -m pytest tests/docs/test_federated_flower.py $(ARGS)

sanitize: $(READY)    ## the C++ kernels under sanitizers, at length; writes tests/results/sanitize.json
	$(PY) tests/support/sanitized.py

trust: sanitize mutants fuzz long    ## the long versions of what docs/trust.md promises; over an hour on two cores

wheel: $(READY)    ## dist/*.whl with the CPU kernels and, where there is nvcc, the CUDA kernels
	@$(PY) -m pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist/*.whl

wheels: $(READY)    ## dist/ with what a registry takes, for this Python: source archive and wheel, checked and tried out
	@$(PY) tests/support/wheels.py

first-hour:    ## what a new user does, in a fresh clone of the last commit; writes tests/results/first_hour.json
	$(PYTHON) tests/support/first_hour.py

matrix: $(READY)    ## each Python and torch that can be had here; writes tests/results/matrix.json. ARGS=--cuda-builds: more
	@$(PY) tests/support/matrix.py $(ARGS)

gpu-check:    ## on a machine with a GPU, whose python3 has torch and the test tools: build, all GPU tests, benchmarks
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

docs: $(READY)    ## the site, in build/site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

lint: $(READY)    ## everything that CI checks without running the code
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

format: $(READY)    ## rewrite the sources as lint wants them
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CSRC)

clean:    ## remove whatever the other targets made
	rm -rf $(VENV) $(VENV)-flower build dist runs *.egg-info .benchmarks .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache lets_kernels/_C.*.so* lets_kernels/_cuda.*.so*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Done again when what is installed changes; the kernels have ninja for that, so pip leaves them alone here.
$(READY): requirements-dev.txt requirements-demo.txt requirements-docs.txt pyproject.toml
	@echo "$(VENV): installing requirements-dev.txt"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -qq -r requirements-dev.txt
	@LETS_KERNELS_CPU=0 LETS_KERNELS_CUDA=0 $(PY) -m pip install -qq --no-build-isolation --no-deps --editable .
	@touch $@ $(DEMO_READY)

# The demo needs no tests, frameworks and linters.
$(DEMO_READY): requirements-demo.txt pyproject.toml
	@echo "Once, make demo installs torch and what it draws with into $(VENV): the 34 packages of requirements-demo.txt,"
	@echo "1.3 GB on the disk (some 7 GB where torch comes with CUDA). Then it compiles the kernels, with nvcc if it is there, and"
	@echo "trains. On two cores: a minute and the download, two to compile, two to train."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -qq -r requirements-demo.txt
	@LETS_KERNELS_CPU=0 LETS_KERNELS_CUDA=0 $(PY) -m pip install -qq --no-build-isolation --no-deps --editable .
	@touch $@
