#!/bin/bash
# What a fork costs, by size, data, depth and fragmentation of the disk, as one section of Markdown
# (see run.sh). Disks are served by a daemon, without a guest at work; what one at full load sees
# is told by `tests/tests/fork_under_load.rs` (section *Crashes survived*).
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
rounds=${ROUNDS:-15}
work=$(mktemp -d "${BENCH_DIR:-/var/tmp}/offshoot-bench.XXXXXX")
(cd "$top" && cargo build --release --quiet --package offshoot --package blockd)
bin=${CARGO_TARGET_DIR:-$top/target}/release
export OFFSHOOT_STORE="$work/store"
clean() {
    "$bin/offshoot" --quiet daemon stop 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT
"$bin/offshoot" --quiet init
PATH="$bin:$PATH" "$bin/offshoot" --quiet daemon start --socket-dir "$work"

quiet() { "$bin/offshoot" --quiet "$@"; }

middle() {
    sort -n | awk '{ t[NR] = $1 }
        END { printf "%.1f [%.1f, %.1f]", t[int((NR + 1) / 2)], t[1], t[NR] }'
}

# A time of an answer, in milliseconds.
ms() { sed -n "s/.*\"${1}_us\": *\([0-9]*\).*/\1/p" | awk '{ print $1 / 1000 }'; }

# Forks a served disk again and again, and removes the children: depth grows by one each time.
measure() { # NAME WHAT
    local name=$1 i answer
    quiet disk attach "$name" --socket "$work/$name.sock"
    : >"$work/took" && : >"$work/pause"
    for ((i = 0; i < rounds; i++)); do
        sync -f "$work"
        answer=$("$bin/offshoot" --json disk fork "$name" "$name-$i")
        ms took <<<"$answer" >>"$work/took"
        ms pause <<<"$answer" >>"$work/pause"
        quiet disk rm "$name-$i"
    done
    quiet disk detach "$name" --force >/dev/null
    echo "| $2 | $(middle <"$work/took") | $(middle <"$work/pause") |"
    quiet disk rm "$name"
}

data() { # NAME BYTES
    head -c "$2" /dev/urandom | quiet disk write "$1" --offset 0
}

cat <<END
## Forks of disks in service

$rounds forks each, one after the other (so the depth grows by as many), of a disk that a daemon
serves and nobody writes to just then: times in ms, median [best, worst]. *fork* is all that the
caller waits for, *pause* the part of it in which guests wait. Nothing is copied. What a fork does
cost is syncs of the host's file system, and reading the map again from the page cache.

| disk | fork | pause |
|---|---|---|
END
for size in 1G 64G 1T; do
    quiet disk create vm --size "$size"
    measure vm "$size, empty"
done
quiet disk create vm --size 1T
data vm 256M
measure vm "1T, 256 MiB of data"
quiet disk create vm --size 1T
data vm 2G
measure vm "1T, 2 GiB of data"
for depth in 64 256; do
    quiet disk create vm --size 64G
    for ((d = 0; d < depth; d++)); do
        quiet disk fork vm "drop-$d"
        quiet disk rm "drop-$d"
    done
    measure vm "64G, $depth segments below it"
done
