# Each target is one line, `python -m tools.dev <command>`, for machines without make too.
# Extra arguments go into ARGS: make test ARGS="-k moves", make bench ARGS="--full".
PYTHON ?= python3
ARGS ?=

.PHONY: setup build test test-kernels gpu lint bench clean

setup:
	@$(PYTHON) -m tools.dev setup

build:
	@$(PYTHON) -m tools.dev build

test:
	@$(PYTHON) -m tools.dev test $(ARGS)

test-kernels:
	@$(PYTHON) -m tools.dev test-kernels $(ARGS)

gpu:
	@$(PYTHON) -m tools.dev gpu $(ARGS)

lint:
	@$(PYTHON) -m tools.dev lint

bench:
	@$(PYTHON) -m tools.dev bench $(ARGS)

clean:
	@$(PYTHON) -m tools.dev clean
