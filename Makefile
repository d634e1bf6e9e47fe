.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench
BIN := .venv/bin
# The tests run in four processes, two at a time, the longest first: more would start Spark, which takes half a minute to
# warm up, more often.
TESTS := jobs pipelines tokenizer rest
TESTS_jobs := tests/jobs
TESTS_pipelines := tests/pipelines
TESTS_tokenizer := tests/tokenizer
TESTS_rest := tests/test_*.py tests/benchmarks tests/infra

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

test: .venv/ready check  ## check, then every test but the slow and the GPU ones; a process prints when it has ended
	@echo "two processes at a time: $(TESTS); each prints its results when it ends"
	@$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync $(TESTS:%=test-%)

test-%:
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" $(TESTS_$*)

bench: .venv/ready  ## speed of fit and encode as ratios; `sid bench quantizers --embeddings FILE` compares quality
	$(BIN)/sid bench encode
	$(BIN)/sid bench fit
