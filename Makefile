# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Touched when .venv holds what pyproject.toml and constraints.txt ask for.
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test

demo: $(READY)
	$(BIN)/tracedensity density "Once upon a time there was a little" --html demo.html
	@echo "The figure is in demo.html: open it in a browser."

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest

# torch goes first and alone: asked for with its exact version, pip can take a CPU-only wheel where the machine offers one;
# as a dependency of something else it would resolve to the build with all GPU libraries.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tracedensity needs Python 3.11 or newer, but $(PYTHON) is older or missing: try 'make PYTHON=python3.11'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)
