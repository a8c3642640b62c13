# make demo    train the default run and say where its picture is
# make test    style, types and tests
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := demo
.PHONY: demo test lint teach-fashion teach-digits teach-emoji clean

demo: $(VENV)/.installed
	$(RUN) -m onestep.train
	@echo
	@echo "The picture (teacher on the left, student on the right) is runs/dmd2-fashion/grid.png"

test: lint
	$(RUN) -m pytest

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

teach-fashion: $(VENV)/.installed-teach
	$(RUN) -m onestep.teach fashion --config train/teach_fashion.yaml

teach-digits: $(VENV)/.installed-teach
	$(RUN) -m onestep.teach digits --config train/teach_digits.yaml

teach-emoji: $(VENV)/.installed-teach
	$(RUN) -m onestep.teach emoji --config train/teach_emoji.yaml

# Runs are kept: they are what a long training leaves behind.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find onestep eval tests -type d -name __pycache__ -prune -exec rm -rf {} +

# A half-made environment would pass for a whole one: it is removed where venv or pip's own installation fails.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "no virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install -e .
	touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install -e '.[$*]'
	touch $@
