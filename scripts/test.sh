#!/usr/bin/env bash
# All that must hold before a change lands. CI runs exactly this.
#
# Root is needed: the tests use real network namespaces, cgroups and eBPF programs, all of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

[ "$(id -u)" = 0 ] || {
    echo "test: run as root: the tests make network namespaces and load eBPF programs" >&2
    exit 1
}

phase "install what is missing" scripts/install.sh
scripts/lint.sh
# The end-to-end tests start the real commands, so these are built first, in the same profile.
phase "build the commands" cargo build --release --locked --bin heddle --bin heddle-bench
phase "documentation examples" cargo test --release --locked --workspace --doc --quiet
phase "tests" cargo nextest run --release --locked --workspace
printf '\nAll tests passed (%d s).\n' "$SECONDS"
