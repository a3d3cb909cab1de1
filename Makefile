# make run    the main job, with the embedded defaults        make check   format, lint, types, contracts
# make test   the tests                                       make verify  the long checks
# make bench  an intercept beside the bare socket             make coverage, make format, make clean
# make core-coverage  protocol/ and the core, all of it       make mutation  the core, each small thing wrong
.DEFAULT_GOAL := help
.PHONY: help run test check format verify bench coverage core-coverage mutation clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CORE := address_space/declared attempt hypervisor/hv_status hypervisor/slat hypervisor/software intercept \
	interval_index mapping mmu_notifier partition progress_guard range_map region region_list region_manager \
	virtual_processor
# What decides; every line and branch of it, and of protocol/, is reached in virtual time.

help:
	@sed -n '1,4s/^# //p' Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "interceptd needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

run: $(READY)
	@$(BIN)/interceptctl exercise
	@echo; echo "setting: real guests: process + vmm, under KVM"
	@$(BIN)/interceptctl guest || [ $$? -eq 4 ]  # 4: no KVM here, which it said

test: $(READY)
	$(BIN)/python -m pytest -m 'not verify'

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

verify: $(READY)
	$(BIN)/python -m pytest -m verify -v

bench: $(READY)
	@$(BIN)/python tests/benchmarks/bench.py

core-coverage: $(READY)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q tests/protocol tests/service
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=100 --include='$(shell \
		echo protocol/intercept_protocol/*.py $(CORE:%=service/interceptd/%.py) | tr ' ' ',')'

mutation: $(READY)
	@PYTHONPATH=tests $(BIN)/python -m mutation $(ONLY)

coverage: $(READY)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m 'not verify'
	$(BIN)/coverage combine
	$(BIN)/coverage report

clean:
	rm -rf $(VENV) .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
