# Every task of the project. The first two are all a newcomer needs:
#   make demo     quire's main job on real data, with a picture
#   make test     every test, also as an ordinary user when run as root
PYTHON ?= python3
# As many tests at once as there are processors.
PYTEST_ARGS ?= -n auto --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
VENV_STAMP := $(VENV)/.stamp-venv
SETUP_STAMP := $(VENV)/.stamp-setup
BENCH_STAMP := $(VENV)/.stamp-bench
CONSUMERS_STAMP := $(VENV)/.stamp-consumers
RUST_SOURCES := $(shell find crates -name target -prune -o \( -name '*.rs' -o -name Cargo.toml \) -print) \
	Cargo.toml $(wildcard Cargo.lock rust-toolchain.toml .cargo/config.toml)
# Tests whose meaning depends on who runs them: the pmaps, limits and devices of an ordinary user differ. Root
# runs them with the best pmap; the others are those of an ordinary user, and tested as one.
ORDINARY_USER_TESTS := tests/contract tests/docs/test_pages.py
IS_ROOT := $(filter 0,$(shell id -u))
extra = $(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$(1)'])"
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup demo test test-rust test-python test-long test-ordinary-user lint lint-rust lint-python format bench clean help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1\t\2/p' Makefile | expand -t 28

setup: $(SETUP_STAMP)  ## makes .venv, builds the native core and installs quire with its extras

$(VENV_STAMP):
	@.ci/check-system $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install 'maturin>=1.9,<2'
	@touch $@

$(SETUP_STAMP): $(VENV_STAMP) pyproject.toml $(RUST_SOURCES)
	@.ci/check-system $(PYTHON)
	@echo 'building the native core and installing quire: some minutes the first time, seconds later'
	@$(PIP) install --no-build-isolation --editable '.[all,test,lint]'
	@touch $@

$(BENCH_STAMP): $(SETUP_STAMP) pyproject.toml
	$(PIP) install $$($(call extra,bench))
	@touch $@

$(CONSUMERS_STAMP): $(SETUP_STAMP) pyproject.toml
	@echo 'installing the libraries that tests give mapped memory to'
	@$(PIP) install $$($(call extra,consumers))
	@touch $@

demo: $(SETUP_STAMP)  ## the main job on real data; DEMO_ARGS="--size 100MiB" and the like
	$(BIN)/quire demo $(DEMO_ARGS)

test: test-rust test-python test-ordinary-user  ## every test

test-rust:
	@.ci/check-system $(PYTHON)
	cargo test --quiet --release -p quire-core

test-python: $(SETUP_STAMP) $(CONSUMERS_STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(if $(IS_ROOT),--best-pmap)

test-long: $(SETUP_STAMP) $(CONSUMERS_STAMP)  ## the tests that take minutes, and are in no other run
	$(BIN)/python -m pytest -m long -o faulthandler_timeout=900

test-ordinary-user: $(SETUP_STAMP)
ifneq ($(IS_ROOT),)
	@echo "as an ordinary user: $(ORDINARY_USER_TESTS)"
	@.ci/as-ordinary-user $(BIN)/python -m pytest -p no:cacheprovider $(PYTEST_ARGS) $(ORDINARY_USER_TESTS)
endif

lint: lint-rust lint-python  ## formats, types, lints and documentation links; changes nothing

lint-rust:
	@.ci/check-system $(PYTHON)
	cargo fmt --all --check
	cargo clippy --quiet --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' cargo doc --quiet --release --workspace --no-deps --document-private-items

lint-python: $(SETUP_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest quire._core --allowlist .ci/stubtest-allowed --ignore-unused-allowlist

format: $(SETUP_STAMP)  ## formats Rust and Python
	cargo fmt --all
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(BENCH_STAMP)  ## measurements beside numpy.memmap, zarr, tensorstore, obstore and fsspec
	$(BIN)/python -m bench $(BENCH_ARGS)

clean:  ## removes what the other tasks made
	rm -rf $(VENV) target build dist demo-out bench/out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f python/quire/_core.*.so
	find python tests bench -name __pycache__ -prune -exec rm -rf {} +
