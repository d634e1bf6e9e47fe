.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench
BIN := .venv/bin
# Each part is a process of its own: what libraries keep in memory is given back, and tests do not depend on each other.
TEST_PARTS := "tests/test_*.py tests/benchmarks tests/infra" tests/tokenizer tests/jobs/ctr \
	"tests/jobs --ignore tests/jobs/ctr" tests/pipelines

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

.venv/ready: requirements.lock setup.cfg infra/setup.sh
	@infra/setup.sh

setup: .venv/ready  ## packages, Delta jars and (if there is none) a Java, all inside .venv

demo: .venv/ready  ## a whole night on generated data; ARGS="--data DIR" for your own
	@$(BIN)/sid demo $(ARGS)

check: .venv/ready  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: .venv/ready check  ## check, then every test but the slow and the GPU ones
	@set -e; for part in $(TEST_PARTS); do $(BIN)/python -m pytest -m "not slow and not gpu" $$part; done

bench: .venv/ready  ## speed of fit and encode as ratios; `sid bench quantizers --embeddings FILE` compares quality
	$(BIN)/sid bench encode
	$(BIN)/sid bench fit
