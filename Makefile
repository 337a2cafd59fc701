# Two commands set everything up from a fresh clone: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# one more than cores: tests that wait for a browser, a socket or a process leave theirs to another
WORKERS ?= $(shell expr 1 + $$(nproc 2>/dev/null || echo 2))

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/diagd-export --model crafter-3m --output out/crafter-3m.diagd
	$(BIN)/python examples/demo.py out/crafter-3m.diagd out/crafter.mp4
	@echo "Play it: $(BIN)/diagd-play out/crafter-3m.diagd"

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --no-warn-unreachable --cache-dir .mypy_cache/win32 -p diagd -p worlds

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml
	$(BIN)/pip install -q -e '.[export,play]'
	touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml worlds/pyproject.toml
	$(BIN)/pip install -q -e '.[dev]' -e ./worlds
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
