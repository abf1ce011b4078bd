# Two commands for a new user: `make demo` and `make test`. Both set everything up first, in .venv.

# The first interpreter on the path that is Python 3.11 or 3.12; `make PYTHON=/path/to/python3.12 test` overrides it.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := $(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test setup lint nano-base

setup: .venv/ready

# torch first: megatron-core would otherwise draw in whichever build the resolver likes.
.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "coalm needs Python 3.11 or 3.12 on the path"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/ready
	$(BIN)/coalm demo --out runs/demo-$(STAMP)

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

# Rebuild the demo's base from nothing: about eight minutes on two cores.
nano-base: .venv/ready
	$(BIN)/python -m coalm_nemo.demo.rebuild_base --out runs/nano_base-$(STAMP)
