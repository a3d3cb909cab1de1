# make setup  both commands, in .venv/bin                     make format  what make check asks of formatting
# make run    the main job, with the embedded defaults        make check   format, lint, types, contracts
# make test   the tests                                       make verify  the long checks
# make bench  an intercept beside other servers               make bench-scale, make bench-compare
# make fuzz   the byte parsers, SECONDS=600 each              make mutation  mutants of the core, which tests must kill
# make explore  random schedules of the core, judged step by step
# make firecracker  fetches the one that some tests run; the tests do it
# make coverage, make core-coverage (100 % of protocol/ and of the core), make clean
.DEFAULT_GOAL := help
.PHONY: help setup run test check format verify fuzz bench bench-compare bench-scale coverage core-coverage explore mutation firecracker clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FUZZ_READY := $(VENV)/.fuzz-ready
SECONDS ?= 600
CORE := address_space/declared memory/attempt memory/guest_mappings memory/known_vmas hypervisor/hv_status hypervisor/slat hypervisor/software memory/fault_handler \
	pages/interval_index pages/mapping mmu_notifier pages/ordered_map partition/partition partition/progress_guard eager_lock quota pages/range_bounds pages/range_map pages/sorted_chunks \
	memory/mapping_change memory/region memory/region_change memory/region_facts memory/region_list memory/region_manager partition/virtual_processor
# The code that decides: tests in virtual time must cover every line and branch of it, and of protocol/.

help:
	@sed -n '1,8s/^# //p' Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "interceptd needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

setup: $(READY)

run: $(READY)
	@$(BIN)/interceptctl exercise
	@echo; echo "mode: real guests (process + vmm, under KVM)"
	@$(BIN)/interceptctl guest || [ $$? -eq 4 ]  # 4: no KVM, as its message says

FIRECRACKER := .firecracker/firecracker-1.12.1

$(FIRECRACKER): tests/firecracker/requirements.txt | $(READY)
	@$(BIN)/python tests/firecracker/binary.py

firecracker: $(FIRECRACKER)

test: $(READY)
	@$(MAKE) --no-print-directory firecracker || true
	$(BIN)/python -m pytest -m 'not verify' --numprocesses=auto --dist=worksteal

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(FUZZ_READY): $(READY)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet --editable '.[dev,fuzz]'
	@touch $@

verify: $(READY)
	@$(MAKE) --no-print-directory firecracker || true
	@$(MAKE) --no-print-directory $(FUZZ_READY) || echo "verify: no atheris for this Python: no fuzzing"
	@for tool in spin gcc podman runc slirp4netns catatonit debootstrap; do \
		command -v $$tool > /dev/null || echo "verify: apt-get install $$tool"; done
	@$(BIN)/python -m pytest -m 'verify and not alone' --numprocesses=auto --dist=worksteal; together=$$?; \
		$(BIN)/python -m pytest -m 'verify and alone' -v; exit $$((together | $$?))

fuzz: $(FUZZ_READY)
	@for target in tests/fuzz/corpus/*/; do \
		echo "$$target"; PYTHONPATH=tests $(BIN)/python tests/fuzz/run.py $$(basename $$target) $(SECONDS) || exit 1; \
	done

BENCH_READY := $(VENV)/.bench-ready
BENCH := tests/benchmarks
RESULTS := $(BENCH)/results

$(BENCH_READY): $(READY)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet --editable '.[dev,bench]'
	@touch $@

bench: $(BENCH_READY)
	@$(MAKE) --no-print-directory firecracker || true
	@PYTHONPATH=tests $(BIN)/python $(BENCH)/bench.py --json $(RESULTS)/latest.json --plot $(RESULTS)/latest.png

bench-compare: $(BENCH_READY)
	@PYTHONPATH=tests $(BIN)/python $(BENCH)/bench.py --json $(RESULTS)/latest.json --compare $(RESULTS)/baseline.json

bench-scale: $(BENCH_READY)
	@$(BIN)/python $(BENCH)/scale.py

core-coverage: $(READY)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q tests/protocol tests/service
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=100 --include='$(shell \
		echo 'protocol/**/*.py' $(CORE:%=service/interceptd/%.py) | tr ' ' ',')'

explore: $(READY)
	@PYTHONPATH=tests $(BIN)/python -m explorer $(EXPLORE)

mutation: $(READY)
	@PYTHONPATH=tests $(BIN)/python -m mutation $(ONLY)

coverage: $(READY)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m 'not verify'
	$(BIN)/coverage combine
	$(BIN)/coverage report

clean:
	rm -rf $(VENV) .firecracker fuzz-found .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
