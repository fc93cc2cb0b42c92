# `make demo` and `make test` set up .venv themselves. Another interpreter: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests; with 1 they run one after the other in the order of their files.
JOBS ?= 2
export PYTHON VENV

.PHONY: demo test lint gpu-check venv

demo: venv
	@bash recipes/laptop/demo.sh

test: venv
	@$(VENV)/bin/python -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS))

lint: venv
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy src/millrace converters benchmarks

# The tests that need a GPU and the figures of one, within ten minutes. Its interpreter is one that has torch's CUDA
# build, megatron-core and Millrace, such as that of NVIDIA's container; .venv holds the builds for CPUs.
gpu-check:
	@$(PYTHON) -m benchmarks.gpu --tests --profile

# Leaves at once when the environment is the one that pyproject.toml and constraints/ describe.
venv:
	@constraints/setup.sh $(VENV)
