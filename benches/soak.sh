#!/bin/bash
# The long variants of the crash tests, with what they counted. It takes some minutes, and fails when
# one of them does.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
cd "$top"
export OFFSHOOT_SOAK=1 OFFSHOOT_PROGRAMS_BUILT=1
cargo build --quiet --release --workspace --bins
out=$(mktemp)
trap 'rm -f "$out"' EXIT

# What a test program prints, and how long it took.
soak() {
    local start=$SECONDS
    cargo test --quiet --release -p offshoot-tests --test "$1" -- --nocapture >"$out" 2>&1 ||
        { cat "$out" >&2; return 1; }
    took=$((SECONDS - start))
}

# The largest number after a phrase.
largest() {
    grep -o "$1 [0-9]*" "$out" | grep -o '[0-9]*$' | sort -n | tail -1
}

# Lines with a phrase, in one.
lines() {
    grep -h "$1" "$out" | sed 's/^ *//' | paste -sd ';' | sed 's/;/; /g'
}

cat <<'END'
## Crashes survived

The long variants (`OFFSHOOT_SOAK=1`) of tests that `make test` runs in short. In the first row a
*state* is what a crash can leave on a disk: a point in the order of writes, and a choice of what was
kept, dropped or torn of all that was not durable there. Each one is opened, checked and compared.

| test | what it counted | seconds |
|---|---|---|
END
soak crash_points
echo "| \`crash_points\` | $(largest 'all so far:') crash states, all good in the right order; every" \
    "swapped order was found out | $took |"
soak two_crash_domains
echo "| \`two_crash_domains\` | $(grep -c 'kill [0-9]*: ' "$out") writers killed at random moments, every" \
    "acknowledged write found | $took |"
soak served_crashes
echo "| \`served_crashes\` | $(lines 'without a daemon') | $took |"
soak fork_under_load
echo "| \`fork_under_load\` | $(lines 'pause of'); $(lines 'forks were done') | $took |"
soak vm_fork
echo "| \`vm_fork\` | $(largest 'rounds of the race:') forks of a guest that writes page after page, every" \
    "page of every child as its parent's at one instant | $took |"
soak daemon_upgrade
echo "| \`daemon_upgrade\` | $(lines 'blackout of'); $(lines 'without a completion') | $took |"
