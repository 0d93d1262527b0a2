# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Touched when .venv holds what pyproject.toml and constraints.txt ask for.
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

# The same with the newest TransformerLens 4, everything else as in constraints.txt.
VENV4 := .venv-tl4
READY4 := $(VENV4)/.ready

# On all cores, each of which begins with a share of files that lie together: they have models in common.
PARALLEL := --numprocesses=auto --maxprocesses=8 --dist=worksteal

.PHONY: demo test test-tl4 models

demo: $(READY)
	$(BIN)/tracedensity density "Once upon a time there was a little" --html demo.html
	@echo "The figure is in demo.html: open it in a browser."

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest $(PARALLEL)

test-tl4: $(READY4)
	$(VENV4)/bin/python -c 'import importlib.metadata as m; print("TransformerLens", m.version("transformer-lens"))'
	$(VENV4)/bin/pytest $(PARALLEL)

models: $(READY) $(READY4)
	$(BIN)/pytest -q $(PARALLEL) tests/test_families.py --junitxml=$(VENV)/families.xml
	$(VENV4)/bin/pytest -q $(PARALLEL) tests/test_families.py --junitxml=$(VENV4)/families.xml
	$(BIN)/python docs/models_table.py \
		$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("transformer-lens"))')=$(VENV)/families.xml \
		$$($(VENV4)/bin/python -c 'import importlib.metadata as m; print(m.version("transformer-lens"))')=$(VENV4)/families.xml

# torch goes first and alone: asked for with its exact version, pip can take a CPU-only wheel where the machine offers one;
# as a dependency of something else it would resolve to the build with all GPU libraries.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tracedensity needs Python 3.11 or newer, but $(PYTHON) is older or missing: try 'make PYTHON=python3.11'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

$(READY4): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	grep -v '^transformer-lens==' constraints.txt > $(VENV4)/constraints.txt
	$(VENV4)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV4)/constraints.txt \
		"transformer-lens>=4,<5" -e ".[dev]"
	@touch $@
