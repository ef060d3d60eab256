#!/usr/bin/env bash
# Formatting, clippy and the rules for dependencies (deny.toml): all must be clean.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

advisory_database=https://github.com/rustsec/advisory-db

# Advisories need the RustSec database, which is fetched. Where that cannot be reached the other
# rules still hold, and the gap is said aloud rather than passed over.
check_dependencies() {
    local checks=(bans licenses sources)
    if timeout 20 git ls-remote --quiet "$advisory_database" HEAD >/dev/null 2>&1; then
        checks+=(advisories)
    else
        printf 'lint: NOT CHECKED: advisories (%s cannot be reached from here)\n' "$advisory_database"
    fi
    # Duplicates are warnings by deny.toml: worth a look with `cargo deny check bans`, not on every run.
    cargo deny --locked --log-level error check --hide-inclusion-graph "${checks[@]}"
}

phase "formatting" cargo fmt --all -- --check
phase "clippy" cargo clippy --release --locked --workspace --all-targets -- -D warnings
phase "dependency rules" check_dependencies
