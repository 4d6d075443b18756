# Everything runs in .venv, which `make .venv` creates from setup.cfg under the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-oldest lint format clean

.venv: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "LSM needs Python 3.11 or later, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	# torch first and alone: what follows then finds it installed and no CUDA build is resolved beside it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[nano,dev]'
	touch .venv

quickstart: .venv
	$(BIN)/python -m recipes.quickstart

test: .venv lint
	$(BIN)/python -m pytest

# The same tests under the oldest transformers that setup.cfg allows.
test-oldest: .venv-oldest
	.venv-oldest/bin/python -m pytest

.venv-oldest: setup.cfg pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints-oldest.txt)"
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt --editable '.[nano,dev]'
	touch .venv-oldest

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs build *.egg-info
