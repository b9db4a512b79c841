# make demo          set up, then train the folded language model on 4 CPU ranks and compare it with one process
# make demo STEPS=4  the same, shorter
# make test          lint, format, types, tests, doctests
# make test-long     the full matrices
# make test-kernels  tests of the Triton kernels in Triton's interpreter, for machines without a GPU
# make docs          the pages of docs/, with warnings as errors, into build/docs
# make dist          sdist and wheel into dist/, and a look at the wheel in an empty environment

PYTHON ?= python3
NPROC ?= 4
TP ?= 2
EP ?= 4
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed
export PYTHONDONTWRITEBYTECODE := # empty: workers and spawned ranks share the bytecode of what they import
IN_PARALLEL := --numprocesses=$(WORKERS) --dist=worksteal

.PHONY: help setup demo test test-long test-kernels lint format types docs dist clean

help:
	@sed -n 's/^# //p' Makefile

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[testing,hf,examples,docs,dev]'
	touch $@

demo: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) \
		examples/train_folded_lm.py --tp $(TP) --ep $(EP) $(if $(STEPS),--steps $(STEPS)) $(DEMO_ARGS)

test: lint $(INSTALLED)
	$(MAKE) --jobs=2 types docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

test-long: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long $(IN_PARALLEL) $(PYTEST_ARGS)

# The interpreter of Triton 3.6 makes numbers of arrays with one element, which numpy 2.4 refuses.
test-kernels: $(INSTALLED)
	test -d build/triton || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--target build/triton triton==3.6.0 'numpy<2.4'
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=build/triton $(BIN)/python -m pytest $(IN_PARALLEL) \
		-W 'ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning' \
		tests/moe/test_kernels.py tests/moe/test_products.py tests/moe/test_decisions.py tests/moe/test_onesided.py $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy --strict src

docs: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs

dist: $(INSTALLED)
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[testing]"
	cd build/wheel && bin/python -I ../../tests/support/check_wheel.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
