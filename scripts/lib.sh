# Shared by the scripts beside it: sourced, not run.

# One target folder outside the checkout, so that a clean checkout reuses what was built.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/heddle/target}
# Tools that scripts/install.sh built.
export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"

# phase TITLE COMMAND...: runs the command under a title and says how long it took.
phase() {
    local title=$1 started=$SECONDS
    shift
    printf '\n=== %s\n' "$title"
    if ! "$@"; then
        printf '=== FAILED: %s (after %d s)\n' "$title" $((SECONDS - started)) >&2
        exit 1
    fi
    printf '=== done: %s (%d s)\n' "$title" $((SECONDS - started))
}
