#!/usr/bin/env bash
# `make demo`: runs examples/shop as a real mesh on this machine and shows what the mesh does.
#
#   DEMO_ONCE=1   take the mesh down at the end and exit 0 (default: leave it running)
#
# Every step that expects something checks it: an allowed call that fails, or a denied one that gets
# through, ends the demo with an error.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

mesh=shop
once=${DEMO_ONCE:-0}
venv=${HEDDLE_VENV:-$HOME/.cache/heddle/venv}
# The mesh runs on a copy, so that edits made here or by you leave the checkout alone.
shop=$HOME/.cache/heddle/demo/shop
published=http://localhost:8080
heddle=$CARGO_TARGET_DIR/release/heddle

main() {
    [ "$(id -u)" = 0 ] || fail "run as root: the mesh makes network namespaces and loads eBPF programs"
    prepare
    start_mesh
    show_names_and_calls
    show_load
    show_flows
    show_denied_callers
    show_live_policy_edit
    show_explain
    finish
}

# --- Steps ---------------------------------------------------------------------------------------

prepare() {
    title "Install what is missing and build" \
        "Nothing is installed twice; the build is the one that tests and benchmarks use."
    scripts/install.sh
    cargo build --release --locked --bin heddle
}

start_mesh() {
    title "Start the mesh: heddle up $shop" \
        "nginx, httpbin under gunicorn, Redis, a Python worker, curl and an intruder, each in a network" \
        "namespace of its own. None of them is changed or knows of the mesh."
    run down
    copy_shop
    on_exit_take_down
    run up "$shop" --detach
    run status
}

show_names_and_calls() {
    title "Programs find each other by name" \
        "The client asks for http://frontend/api/counter: DNS in its namespace, the service's address," \
        "then a replica picked at connect(); nginx does the same with the API, and the API with Redis."
    expect_ok exec client -- curl --silent --show-error --fail --max-time 5 http://frontend/api/counter
    echo "and through the port published on this machine ($published):"
    curl --silent --show-error --fail --max-time 5 "$published/api/counter" || fail "the published port does not answer"
}

show_load() {
    title "Load, from inside and from outside" \
        "wrk in the client's place against nginx over direct connections, then through the published port" \
        "down to Redis. The connections are the kernel's own: no proxy carries a byte of the first run."
    run exec client -- wrk -t1 -c16 -d3s http://frontend/
    echo "\$ wrk $published/api/counter"
    wrk -t1 -c8 -d3s "$published/api/counter" || fail "wrk found no server"
}

show_flows() {
    title "Live flows" "Every connection, with both identities, the verdict and the policy behind it, as it happens."
    watch_flows
    title "Who calls whom: heddle flows --summary" "Path, verdict, connections, bytes and the median round-trip time."
    run flows --summary
}

watch_flows() {
    local shown
    shown=$(timeout --foreground 4 "$heddle" flows --mesh "$mesh" -f --since 1s || true)
    head -n 25 <<<"$shown"
    [ -n "$shown" ] || fail "no flow was shown in four seconds, although the client calls twice a second"
}

show_denied_callers() {
    title "A caller that no policy names is refused" \
        "At connect(), at once, and nothing reaches the server."
    expect_denied 7 exec intruder -- curl --silent --show-error --max-time 5 http://api/get
    expect_denied 1 exec intruder -- redis-cli -h redis -e ping
    echo "The API may be called by the frontend only, and Redis by the API only, so these are refused too:"
    expect_denied 7 exec client -- curl --silent --show-error --max-time 5 http://api/get
    expect_denied 1 exec frontend -- redis-cli -h redis -e ping
}

show_live_policy_edit() {
    local policies=$shop/policies.yaml
    local frontend_only='principals: ["cluster.local/ns/shop/sa/frontend"]'
    local client_too='principals: ["cluster.local/ns/shop/sa/frontend", "cluster.local/ns/shop/sa/client"]'
    local call=(exec client -- curl --silent --fail --max-time 5 --output /dev/null http://api/get)

    title "A policy edit takes effect while everything runs" \
        "The API's policy gets one more caller, the client; then the edit is taken back."
    grep -qF "$frontend_only" "$policies" || fail "$policies does not say what this step edits"
    local text
    text=$(<"$policies")
    printf '%s\n' "${text/"$frontend_only"/"$client_too"}" >"$policies"
    diff -u examples/shop/policies.yaml "$policies" | grep '^[+-] ' || true
    wait_until "the client may call the API" heddle "${call[@]}"
    cp examples/shop/policies.yaml "$policies"
    wait_until "the client may not call it any more" refuses "${call[@]}"
}

show_explain() {
    title "Why? heddle explain" "The path of a connection and the object that decides it, without making the connection."
    run explain frontend api:80
    # The answer is "denied": that is what is to be seen, so its exit code is not an error here.
    show explain intruder redis:6379
    heddle explain intruder redis:6379 || true
}

finish() {
    if [ "$once" = 1 ]; then
        title "Take it down" "Nothing stays behind: no process, namespace, cgroup or eBPF program."
        trap - EXIT
        run down
        return
    fi
    trap - EXIT
    title "It keeps running" "Try:"
    cat <<INSTRUCTIONS
  curl $published/api/counter
  $heddle flows --mesh $mesh -f
  $heddle exec --mesh $mesh client -- curl http://frontend/
  edit the files in $shop: changes apply at once
  $heddle down --mesh $mesh        takes it down
INSTRUCTIONS
}

# --- Helpers -------------------------------------------------------------------------------------

title() {
    printf '\n\033[1m=== %s\033[0m\n' "$1"
    shift
    printf '    %s\n' "$@"
    echo
}

fail() {
    printf '\ndemo: FAILED: %s\n' "$*" >&2
    exit 1
}

# heddle SUBCOMMAND ARGUMENT...: the command, on this demo's mesh.
heddle() {
    local subcommand=$1
    shift
    "$heddle" "$subcommand" --mesh "$mesh" "$@" </dev/null
}

show() { printf '$ heddle %s\n' "$*"; }

run() {
    show "$@"
    heddle "$@" || fail "heddle $* ended with exit code $?"
}

expect_ok() {
    show "$@"
    heddle "$@" || fail "this must be allowed, and failed: heddle $*"
    echo
}

# expect_denied CODE exec ...: the program's own exit code says that it could not connect (curl: 7,
# redis-cli: 1); any other failure is not a refusal.
expect_denied() {
    local expected=$1 code=0
    shift
    show "$@"
    heddle "$@" 2>&1 || code=$?
    [ $code != 0 ] || fail "this must be denied, and got through: heddle $*"
    [ $code = "$expected" ] || fail "this must end with exit code $expected (could not connect), not $code: heddle $*"
    echo "  -> refused, as it must be"
}

# refuses exec WORKLOAD -- curl ...
refuses() {
    local code=0
    heddle "$@" 2>/dev/null || code=$?
    [ $code = 7 ]
}

# wait_until WHAT COMMAND...: at most ten seconds.
wait_until() {
    local what=$1 started=$EPOCHREALTIME deadline=$((SECONDS + 10))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || fail "ten seconds after the edit it is not so: $what"
        sleep 0.05
    done
    printf '  -> %s (%d ms later, this command included)\n' "$what" $(((${EPOCHREALTIME/./} - ${started/./}) / 1000))
}

copy_shop() {
    rm -rf "$shop"
    mkdir -p "$shop"
    cp examples/shop/*.yaml "$shop"
    # Workloads have an environment of their own: what is said about the venv here must be written there.
    sed -i "s|\${HEDDLE_VENV:-\$HOME/.cache/heddle/venv}|$venv|" "$shop/api.yaml"
}

# A demo that fails leaves nothing running either; what its programs said is shown first.
on_exit_take_down() {
    trap 'code=$?; show_logs >&2; heddle down || true; exit $code' EXIT
}

show_logs() {
    local workload
    heddle status || true
    for workload in frontend api redis worker client intruder; do
        printf '\n--- last lines of %s\n' "$workload"
        heddle logs "$workload" 2>&1 | tail -n 5 || true
    done
}

main
