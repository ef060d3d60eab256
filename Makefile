# Every command a newcomer needs. `make` alone lists them.

export CARGO_TARGET_DIR ?= $(HOME)/.cache/heddle/target

.DEFAULT_GOAL := help
.PHONY: help demo test lint fmt build install bench-direct bench-direct-scale bench-splice bench-tunnel soak-direct

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Run a real mesh on this machine and show it (DEMO_ONCE=1: take it down at the end)
	@scripts/demo.sh

test: ## Install what is missing, then lint and run every test
	@scripts/test.sh

lint: ## Formatting, clippy and the dependency rules
	@scripts/lint.sh

fmt: ## Format the code
	cargo fmt --all

build: ## Build the heddle command in the one profile that tests, demo and benches share
	cargo build --release --locked --bin heddle --bin heddle-bench

install: ## Install the programs that build, tests and demo need
	@scripts/install.sh

bench-direct: install build ## Measure the kernel's direct path beside plain TCP
	$(CARGO_TARGET_DIR)/release/heddle-bench direct

bench-direct-scale: install build ## Measure the direct path and the agent under 10 to 10,000 services
	$(CARGO_TARGET_DIR)/release/heddle-bench direct-scale

soak-direct: install build ## Check every byte of millions of connections (SOAK_CONNECTIONS=3000000)
	SOAK_CONNECTIONS=$${SOAK_CONNECTIONS:-3000000} cargo nextest run --release --locked --profile soak -p e2e \
		--no-capture -E 'test(/^stress::/)'

bench-splice: install build ## Measure spliced connections beside plain TCP: both ends on one CPU, and on two
	$(CARGO_TARGET_DIR)/release/heddle-bench direct --splice --replicas 0 --cpus 0,0
	$(CARGO_TARGET_DIR)/release/heddle-bench direct --splice --replicas 0 --cpus 0,1

bench-tunnel: install build ## Measure the tunnel between two nodes beside plain TCP
	$(CARGO_TARGET_DIR)/release/heddle-bench tunnel
