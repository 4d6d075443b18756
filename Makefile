# Everything runs in .venv, which `make .venv` creates from setup.cfg under the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart study demo test test-oldest lint types format docs clean

# $(call install,CONSTRAINTS) makes the environment that the target names. torch first and alone: what follows then finds
# it installed and no CUDA build is resolved beside it.
define install
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "LSM needs Python 3.11 or later, this is " + sys.version)'
$(PYTHON) -m venv $@
$@/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' $(1))"
$@/bin/python -m pip install --quiet --disable-pip-version-check -c $(1) --editable '.[dev]'
touch $@
endef

.venv: setup.cfg pyproject.toml constraints.txt
	$(call install,constraints.txt)

.venv-oldest: setup.cfg pyproject.toml constraints-oldest.txt
	$(call install,constraints-oldest.txt)

quickstart: .venv
	$(BIN)/python -m recipes.quickstart

# Hours; it goes on where it stopped, and runs/study/study.md is there after the first row.
study: .venv
	$(BIN)/python -m recipes.study --config recipes/configs/study.yaml --output runs/study

# The page of demo/, at http://localhost:7860.
demo: .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[demo]'
	$(BIN)/python demo/app.py

test: .venv lint types
	$(BIN)/python -m pytest -n auto --dist loadfile

# The same tests under the oldest transformers that setup.cfg allows.
test-oldest: .venv-oldest
	.venv-oldest/bin/python -m pytest -n auto --dist loadfile

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv
	$(BIN)/mypy

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site of README and docs, in site/.
docs: .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf runs build site *.egg-info
