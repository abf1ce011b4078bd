# Two commands for a new user: `make demo` and `make test`. Both set everything up first, in .venv.

# The first interpreter on the path that is Python 3.11 or 3.12; `make PYTHON=/path/to/python3.12 test` overrides it.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := $(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-slurm setup lint nano-base test-container test-bfcl test-nemo

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

# The Dockerfile built and run by buildah, as root: about twenty minutes on two cores.
test-container: .venv/ready
	COALM_TEST_CONTAINER=1 $(BIN)/python -m pytest tests/container

# Makes the environment of BFCL's package first, below the user's cache directory.
test-bfcl: .venv/ready
	$(BIN)/python -m coalm_nemo.evaluation.bfcl.environment --release v3
	$(BIN)/python -m pytest tests/evaluation/bfcl

# On a real SLURM of five nodes in namespaces of this host; skipped with a reason where it cannot be (.ci/install-slurm).
test-slurm: .venv/ready
	$(BIN)/python -m pytest -m slurm tests/slurm

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

# Rebuild the demo's base from nothing: about eight minutes on two cores.
nano-base: .venv/ready
	$(BIN)/python -m coalm_nemo.demo.rebuild_base --out runs/nano_base-$(STAMP)

# NeMo 2.7 wants other versions than the rest (megatron-core 0.15, numpy 1), so its recipes are tested in .venv-nemo:
# about 3 GB. --no-deps: what the project asks for itself would put megatron-core 0.16 in its place.
.venv-nemo/ready: pyproject.toml constraints-nemo.txt
	@test -n "$(PYTHON)" || { echo "coalm needs Python 3.11 or 3.12 on the path"; exit 2; }
	$(PYTHON) -m venv .venv-nemo
	.venv-nemo/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-nemo.txt torch numpy
	.venv-nemo/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-nemo.txt \
		'nemo-toolkit[nlp,run]' pytest hypothesis pytest-timeout
	.venv-nemo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-nemo: .venv-nemo/ready
	.venv-nemo/bin/python -m pytest -m nemo tests/nemo
