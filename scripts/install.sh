#!/usr/bin/env bash
# Installs what Heddle's build, tests and demo need and this machine lacks, and says so.
#
# Safe to run again: what is there is left alone, and nothing touches the network then. Packages that
# bring system services (nginx, redis) are installed with their services neither started nor enabled;
# services that ran before go on as they were.
#
#   HEDDLE_VENV   where the demo's Python programs live (default: ~/.cache/heddle/venv)
set -euo pipefail

venv=${HEDDLE_VENV:-$HOME/.cache/heddle/venv}
nextest_version=0.9.143
deny_version=0.20.2

main() {
    install_debian_packages
    require_rust
    install_cargo_tool cargo-nextest "$nextest_version"
    # Without its default features cargo-deny calls the installed cargo instead of carrying one,
    # which halves its build time.
    install_cargo_tool cargo-deny "$deny_version" --no-default-features
    install_python_programs
    say "everything needed is installed"
}

say() { printf 'install: %s\n' "$*"; }

fail() {
    printf 'install: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# --- Debian packages -----------------------------------------------------------------------------

missing_debian_packages() {
    have cc || echo build-essential
    have clang || echo clang
    [ -e /usr/include/bpf/bpf_helpers.h ] || echo libbpf-dev
    have nginx || [ -x /usr/sbin/nginx ] || echo nginx-light
    have redis-server || echo redis-server
    have redis-cli || echo redis-tools
    have wrk || echo wrk
    have ip && have ss || echo iproute2
    have curl || echo curl
    have openssl || echo openssl
    [ -x "$venv/bin/python" ] || debian_python_makes_venvs || echo python3-venv
}

debian_python_makes_venvs() {
    /usr/bin/python3 -c 'import ensurepip, venv' >/dev/null 2>&1
}

install_debian_packages() {
    local missing
    mapfile -t missing < <(missing_debian_packages)
    [ ${#missing[@]} -gt 0 ] || return 0
    say "Debian packages missing: ${missing[*]}"
    have apt-get || fail "this is not a Debian system; install the above by hand, then run this again"
    [ "$(id -u)" = 0 ] || fail "root is needed to install packages: run as root, or: apt-get install ${missing[*]}"

    keep_services_stopped
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null
    let_services_start
    disable_services_of "${missing[@]}"
}

# Debian starts a service as its package is installed, unless policy-rc.d says 101 ("forbidden").
guard=/usr/sbin/policy-rc.d
guard_is_ours=no

keep_services_stopped() {
    [ -e "$guard" ] && return 0 # someone else decides this here: respect it
    guard_is_ours=yes
    trap let_services_start EXIT
    printf '#!/bin/sh\n# Put here for a moment by Heddle'\''s scripts/install.sh.\nexit 101\n' >"$guard"
    chmod 755 "$guard"
}

let_services_start() {
    [ "$guard_is_ours" = yes ] || return 0
    rm -f "$guard"
    guard_is_ours=no
}

# The demo runs these programs itself, inside the mesh: the machine need not run them at boot.
disable_services_of() {
    local package service
    have systemctl || return 0
    for package in "$@"; do
        case $package in
        nginx-light) service=nginx ;;
        redis-server) service=redis-server ;;
        *) continue ;;
        esac
        say "$package: its system service stays off"
        systemctl disable --quiet "$service" 2>/dev/null || true
    done
}

# --- Rust ----------------------------------------------------------------------------------------

require_rust() {
    have cargo || fail "cargo is missing: install Rust 1.95 or later from https://rustup.rs, then run this again"
}

install_cargo_tool() {
    local tool=$1 version=$2
    shift 2
    have "$tool" && return 0
    [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/$tool" ] && return 0
    say "$tool $version (built from source, about two minutes)"
    cargo install --quiet --locked "$tool" --version "$version" "$@"
}

# --- Python programs of the demo -----------------------------------------------------------------

# For the demo, and the SPIFFE client that the tests use as a workload would.
python_packages=(httpbin==0.10.4 gunicorn==27.0.1 redis==8.1.0 spiffe==0.3.2)

python_programs_work() {
    [ -x "$venv/bin/gunicorn" ] && "$venv/bin/python" -c 'import httpbin, gunicorn, redis, spiffe' >/dev/null 2>&1
}

install_python_programs() {
    python_programs_work && return 0
    say "Python packages ${python_packages[*]} into $venv"
    # Debian's own interpreter where it can: a venv breaks when the interpreter it points at goes away.
    local python=/usr/bin/python3
    debian_python_makes_venvs || python=$(command -v python3)
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "${python_packages[@]}"
    python_programs_work || fail "the Python programs in $venv do not start; remove that folder and run this again"
}

main "$@"
