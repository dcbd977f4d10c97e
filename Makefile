# What a user and a developer run. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

.PHONY: help demo test check check-cuda check-gpu bench chaos servers up down

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: ## build, answer examples/queries.jsonl with the shipped model, show the answers
	cargo run --release -- run --queries-file examples/queries.jsonl --corpus-path examples/corpus --output-file results.jsonl
	@scripts/show_results.sh results.jsonl

servers: ## nats-server and redis-server for the tests, fetched where they are missing
	@scripts/servers.sh

test: servers ## everything the tests need, then all tests
	cargo test --workspace

MINUTES ?= 5

chaos: servers ## kill, stop and cut off a whole fleet at random: make chaos [MINUTES=5] [SEED=n]
	cargo build --release --workspace --bin flotilla --example chaos
	"$${CARGO_TARGET_DIR:-target}/release/examples/chaos" --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

up: ## run nats-server and redis-server on this machine, without Docker
	@scripts/servers.sh up

down: ## end what `make up` started
	@scripts/servers.sh down

check: ## what CI checks
	.ci/run

# The compiler of the kernels is as fast however the crate around it is optimised.
check-cuda: ## build for GPUs, compile the kernels for each generation of them; no GPU is needed
	cargo clippy --package flotilla --package flotilla-gpu-worker --package flotilla-engine --all-targets --features flotilla/cuda --locked -- -D warnings
	LD_LIBRARY_PATH="$$(scripts/cuda_libraries.sh compile)" cargo test --package flotilla-engine --features cuda --lib --locked \
		--config 'profile.dev.package.flotilla-engine.opt-level=0' -- cuda::driver --include-ignored

check-gpu: ## on a machine with a GPU: the kernels beside the processor's, and the speed
	scripts/check_gpu.sh build && scripts/check_gpu.sh run

bench: ## measure this machine
	cargo run --release -- bench
