#!/bin/bash
# Flattening 1 GiB in place next to `cp` and to QEMU's block-stream, as one section of Markdown (see
# run.sh): how fast without a guest, and what a guest sees meanwhile when both copy at one rate.
#
# The same chain on both sides: a base, a layer with 1 GiB of data, and a top. Ours is served by the
# daemon, the peer's by qemu-storage-daemon, both over NBD; fio is the guest. Servers take turns.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
rounds=${ROUNDS:-5}
rate=${RATE:-100}
for tool in qemu-storage-daemon qemu-img fio; do
    type -P "$tool" >/dev/null || { echo "flatten: $tool is not installed" >&2; exit 1; }
done
work=$(mktemp -d "${BENCH_DIR:-/var/tmp}/offshoot-bench.XXXXXX")
(cd "$top" && cargo build --release --quiet --package offshoot --package blockd)
bin=${CARGO_TARGET_DIR:-$top/target}/release
export OFFSHOOT_STORE="$work/store"
clean() {
    "$bin/offshoot" --quiet daemon stop 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT
quiet() { "$bin/offshoot" --quiet "$@"; }
now() { echo "${EPOCHREALTIME/[.,]/}"; }

quiet init
PATH="$bin:$PATH" quiet daemon start --socket-dir "$work"
head -c 1G /dev/urandom >"$work/data"
truncate -s 2G "$work/base.raw"
quiet disk create base --size 2G
quiet disk seal base

# --- ours: `vm` stands on a frozen segment with 1 GiB, which stands on `base`.
ours_begin() {
    quiet disk create vm --parent base
    quiet disk write vm --offset 0 <"$work/data"
    quiet disk fork vm kept --flatten manual
    quiet disk export-nbd vm --socket "$work/nbd.sock"
    cat "$work"/store/*.seg >/dev/null
    sync -f "$work"
}
ours_copy() { # [RATE in MiB/s]
    quiet disk flatten vm --wait ${1:+--rate "$1M"}
}
ours_end() {
    quiet disk detach vm --force >/dev/null
    quiet disk rm vm
    quiet disk rm kept
}

# --- the peer: `top` over `mid` with 1 GiB over `base`.
say() { # JSON, and the word that its answer or the event after it has
    local line
    printf '%s\n' "$1" >&"$ask"
    while read -r -u "$answer" line; do
        [[ $line != *"$2"* ]] || return 0
        [[ $line != *'"error"'* ]] || { echo "flatten: $line" >&2; return 1; }
    done
}
peer_begin() {
    cp "$work/data" "$work/part.raw"
    truncate -s 2G "$work/part.raw"
    qemu-img create -q -f qcow2 -F raw -b "$work/base.raw" "$work/mid.qcow2"
    qemu-img convert -f raw -O qcow2 -B "$work/base.raw" -F raw "$work/part.raw" "$work/mid.qcow2"
    qemu-img create -q -f qcow2 -F qcow2 -b "$work/mid.qcow2" "$work/top.qcow2"
    rm "$work/part.raw"
    cat "$work/mid.qcow2" >/dev/null
    sync -f "$work"
    coproc QSD {
        qemu-storage-daemon --chardev stdio,id=m --monitor chardev=m \
            --blockdev "driver=file,filename=$work/base.raw,node-name=bf,aio=io_uring" \
            --blockdev driver=raw,file=bf,node-name=base \
            --blockdev "driver=file,filename=$work/mid.qcow2,node-name=mf,aio=io_uring" \
            --blockdev driver=qcow2,file=mf,backing=base,node-name=mid \
            --blockdev "driver=file,filename=$work/top.qcow2,node-name=tf,aio=io_uring" \
            --blockdev driver=qcow2,file=tf,backing=mid,node-name=top \
            --nbd-server "addr.type=unix,addr.path=$work/nbd.sock" \
            --export nbd,id=e,node-name=top,name=vm,writable=on
    }
    # Copies: those of a coprocess are closed in what runs in the background.
    peer=$QSD_PID
    exec {answer}<&"${QSD[0]}" {ask}>&"${QSD[1]}"
    say '{"execute":"qmp_capabilities"}' '"return"'
}
peer_copy() { # [RATE in MiB/s]
    local speed=$((${1:-0} << 20))
    say '{"execute":"block-stream","arguments":{"job-id":"s","device":"top","base-node":"base",'"\
\"speed\":$speed}}" BLOCK_JOB_COMPLETED
    # Ours ends when the result is durable.
    sync "$work/top.qcow2"
}
peer_end() {
    printf '%s\n' '{"execute":"quit"}' >&"$ask"
    exec {answer}<&- {ask}>&-
    wait "$peer" || true
    rm -f "$work/nbd.sock" "$work"/*.qcow2
}

# SECONDS: p99 in µs of a guest that reads and overwrites what it has written before.
guest() {
    fio --output-format=terse --name=guest --ioengine=nbd "--uri=nbd+unix:///vm?socket=$work/nbd.sock" \
        --rw=randrw --rwmixread=70 --bs=4k --iodepth=4 --offset=1536m --size=256m --time_based=1 \
        --runtime="$1" --percentile_list=99 | grep '^3;' |
        awk -F ';' '{ for (i = 18; i < 38; i++) { split($i, p, "%="); if (p[1] + 0 == 99) print p[2] } }'
}
middle() { sort -n | awk '{ t[NR] = $1 } END { printf "%d [%d–%d]", t[int((NR + 1) / 2)], t[1], t[NR] }'; }

one() { # SIDE: throughput alone, and p99 of the guest alone and beside the copy
    local start alone beside copy
    "$1_begin"
    start=$(now)
    "$1_copy"
    echo $((1024 * 1000000 / ($(now) - start))) >>"$work/$1.speed"
    "$1_end"
    "$1_begin"
    guest 2 >/dev/null
    alone=$(guest 3)
    "$1_copy" "$rate" &
    copy=$!
    beside=$(guest $((1024 / rate - 2)))
    wait "$copy"
    "$1_end"
    echo "$alone" >>"$work/$1.alone"
    echo "$beside" >>"$work/$1.beside"
}
for ((round = 0; round < rounds; round++)); do
    echo "flatten: round $((round + 1)) of $rounds" >&2
    for side in $( ((round % 2)) && echo peer ours || echo ours peer); do one "$side"; done
    cat "$work/data" >/dev/null && sync -f "$work"
    start=$(now)
    cp --reflink=never "$work/data" "$work/copy" && sync "$work/copy"
    echo $((1024 * 1000000 / ($(now) - start))) >>"$work/cp.speed"
    rm "$work/copy"
done

cat <<END
## Flatten in place, next to block-stream

A disk in service with 1 GiB of data in the layer between it and its base is flattened to the base,
next to \`block-stream\` of $(qemu-storage-daemon --version | head -1), and to \`cp\` of a
file, all until the result is durable (ours verifies checksums where there are any). Medians of
$rounds rounds [lowest–highest]; servers take turns. The guest: fio over NBD, 4 KiB, 70 % reads, depth 4;
its p99 while it is alone, and while both sides copy at $rate MiB/s.

| | MiB/s, nobody at work | guest's p99 alone, µs | guest's p99 beside the copy, µs |
|---|---|---|---|
| ours | $(middle <"$work/ours.speed") | $(middle <"$work/ours.alone") | $(middle <"$work/ours.beside") |
| block-stream | $(middle <"$work/peer.speed") | $(middle <"$work/peer.alone") | $(middle <"$work/peer.beside") |
| cp and sync | $(middle <"$work/cp.speed") | – | – |
END
