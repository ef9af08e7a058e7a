# How to test, show and check Offshoot. `make help` lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup build test demo soak bench fuzz clean
.PHONY: lint lint-format lint-clippy lint-docs lint-shell

# In CI the lock file is law.
LOCKED := $(if $(CI),--locked)
TARGET ?= all
SECONDS ?= 60

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## Install the system packages that the tests need (says so first)
	@tests/setup.sh

build: ## Build the release binaries
	cargo build $(LOCKED) --release --workspace

test: setup ## All tests, a short fuzz run, and a list of what was skipped
	@tests/run.sh

demo: setup ## Show what works: guests on forked disks, a machine forked into 32; some minutes
	@tools/demo.sh

soak: setup ## The long variants of all tests, and ten minutes of fuzzing per target
	@OFFSHOOT_SOAK=1 FUZZ_SECONDS=600 tests/run.sh --release

bench: setup ## Run all benchmarks, and write benches/RESULTS.md from what they print
	@benches/run.sh

# Parts, so that `make -k lint` goes on after the first that fails.
lint: lint-format lint-clippy lint-docs lint-shell ## Formatter, clippy, rustdoc, shellcheck

lint-format:
	cargo fmt --all --check

lint-clippy:
	cargo clippy $(LOCKED) --workspace --features offshoot-fuzz/engine --all-targets -- -D warnings

lint-docs:
	RUSTDOCFLAGS="-D warnings" cargo doc $(LOCKED) --workspace --no-deps

lint-shell:
	@if type -P shellcheck >/dev/null; then shellcheck .ci/run $$(find . -path ./target -prune -o \
	    -name '*.sh' -print); else echo "lint: no shellcheck here, shell scripts not looked at"; fi

fuzz: setup ## Fuzz: TARGET=name|all SECONDS=n, or repeat a failure: TARGET=name INPUT=file
	@tests/fuzz/run.sh "$(TARGET)" "$(or $(INPUT),$(SECONDS))"

clean: ## Remove what was built and what the fuzz engine left
	cargo clean
	rm -rf tests/fuzz/artifacts
