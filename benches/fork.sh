#!/bin/bash
# What a fork costs, by size, data, depth and fragmentation of the disk, and under load, next to what
# else there is to make a second disk of one, as one section of Markdown (see run.sh).
#
# Peers: `qemu-img create -b` (the source must be stopped), an overlay put on a disk in service by
# qemu-storage-daemon (in its main loop: with an iothread and requests in work it hangs), and
# `cp --reflink` on XFS, which needs root and a loop device and is left out without them.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
rounds=${ROUNDS:-15}
loaded=${LOADED:-100}
for tool in qemu-storage-daemon qemu-img qemu-io fio; do
    type -P "$tool" >/dev/null || { echo "fork: $tool is not installed" >&2; exit 1; }
done
work=$(mktemp -d "${BENCH_DIR:-/var/tmp}/offshoot-bench.XXXXXX")
(cd "$top" && cargo build --release --quiet --package offshoot --package blockd)
bin=${CARGO_TARGET_DIR:-$top/target}/release
export OFFSHOOT_STORE="$work/store"
clean() {
    "$bin/offshoot" --quiet daemon stop 2>/dev/null || true
    umount "$work/xfs" 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT
quiet() { "$bin/offshoot" --quiet "$@"; }
now() { echo "${EPOCHREALTIME/[.,]/}"; }
quiet init
PATH="$bin:$PATH" quiet daemon start --socket-dir "$work"

# Numbers in a file, in ms: median, p99 and the longest.
middle() {
    sort -n "$1" | awk '{ t[NR] = $1 } END { i = int(NR * 0.99 + 0.5); if (i < 1) i = 1
        printf "%.2f / %.2f / %.2f", t[int((NR + 1) / 2)], t[i], t[NR] }'
}
# A time of an answer, in milliseconds.
ms() { sed -n "s/.*\"${1}_us\": *\([0-9]*\).*/\1/p" | awk '{ print $1 / 1000 }'; }
# Microseconds since the first, in milliseconds.
since() { awk "BEGIN { print ($(now) - $1) / 1000 }"; }

# --- ours: forks a served disk again and again, and removes the children.
forks() { # NAME COUNT
    local i answer
    : >"$work/took" && : >"$work/pause"
    for ((i = 0; i < $2; i++)); do
        answer=$("$bin/offshoot" --json disk fork "$1" "$1-$i" --flatten manual)
        ms took <<<"$answer" >>"$work/took"
        ms pause <<<"$answer" >>"$work/pause"
        quiet disk rm "$1-$i"
    done
}
row() { echo "| $1 | $(middle "$work/took") | $(middle "$work/pause") |"; }
measure() { # NAME WHAT
    quiet disk attach "$1" --socket "$work/$1.sock"
    sync -f "$work"
    forks "$1" "$rounds"
    quiet disk detach "$1" --force >/dev/null
    row "$2"
    quiet disk rm "$1"
}
guest() { # OPTIONS of fio
    fio --output-format=terse --name=guest --ioengine=nbd --bs=4k --iodepth=32 \
        "--uri=nbd+unix:///vm?socket=$work/nbd.sock" "$@" >/dev/null
}
# A disk with 100,000 extents in no order: one block of 4 KiB in each.
fragment() { # SIZE
    quiet disk create vm --size "$1"
    quiet disk export-nbd vm --socket "$work/nbd.sock"
    guest --rw=randwrite --blockalign=64k --size=8g --io_size=400m 2>/dev/null
    quiet disk detach vm --force >/dev/null
    sync -f "$work"
}

cat <<END
## Forks of disks in service

Times in ms: median / p99 / longest of $rounds forks, one after the other, so that the depth grows by
as many, of a disk that a daemon serves and nobody writes to just then; $loaded under load. *fork* is
all that the caller waits for, until it is durable; *pause* the part of it in which guests wait.
Nothing is copied, and the pause holds no I/O of the fork: it is as long as what is in work takes.

| disk | fork | pause |
|---|---|---|
END
for size in 1G 64G 1T; do
    quiet disk create vm --size "$size"
    measure vm "$size, empty"
done
for data in 256M 2G; do
    quiet disk create vm --size 1T
    head -c "$data" /dev/urandom | quiet disk write vm --offset 0
    measure vm "1T, ${data}iB of data"
done
fragment 1T
measure vm "1T, 100,000 extents in no order"
for depth in 64 256; do
    quiet disk create vm --size 64G
    for ((d = 0; d < depth; d++)); do
        quiet disk fork vm "drop-$d" --flatten manual
        quiet disk rm "drop-$d"
    done
    measure vm "64G, $depth segments below it"
done
for load in "writes, first ones and over these:randwrite" "reads:randread"; do
    quiet disk create vm --size 4G
    head -c 1G /dev/urandom | quiet disk write vm --offset 0
    quiet disk export-nbd vm --socket "$work/nbd.sock"
    guest "--rw=${load#*:}" --size=1g --time_based=1 --runtime=600 2>/dev/null &
    fio=$!
    sleep 2
    forks vm "$loaded"
    kill "$fio" 2>/dev/null || true
    wait "$fio" 2>/dev/null || true
    quiet disk detach vm --force >/dev/null
    row "4G, a guest at depth 32: ${load%%:*}"
    quiet disk rm vm
done

# --- the peers.
say() { # JSON
    local line
    printf '%s\n' "$1" >&"$ask"
    while read -r -u "$answer" line; do
        [[ $line != *'"return"'* ]] || return 0
        [[ $line != *'"error"'* ]] || { echo "fork: $line" >&2; return 1; }
    done
}
overlays() { # SIZE: puts one overlay after the other on a disk that is being served
    local i start below=disk over
    coproc QSD {
        qemu-storage-daemon --chardev stdio,id=m --monitor chardev=m \
            --blockdev "driver=file,filename=$work/peer.qcow2,node-name=f,aio=io_uring" \
            --blockdev driver=qcow2,file=f,node-name=disk \
            --nbd-server "addr.type=unix,addr.path=$work/peer.sock" \
            --export nbd,id=e,node-name=disk,name=vm,writable=on
    }
    # Copies: those of a coprocess are closed in what runs in the background.
    peer=$QSD_PID
    exec {answer}<&"${QSD[0]}" {ask}>&"${QSD[1]}"
    say '{"execute":"qmp_capabilities"}'
    for ((i = 0; i < rounds; i++)); do
        over="$work/over-$i.qcow2"
        start=$(now)
        qemu-img create -q -f qcow2 "$over" "$1"
        say '{"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"o'"$i"'","backing":null,'"\
\"file\":{\"driver\":\"file\",\"filename\":\"$over\"}}}"
        say '{"execute":"blockdev-snapshot","arguments":{"node":"'"$below\",\"overlay\":\"o$i\"}}"
        sync "$over"
        since "$start" >>"$work/peer.took"
        below=o$i
    done
    printf '%s\n' '{"execute":"quit"}' >&"$ask"
    exec {answer}<&- {ask}>&-
    wait "$peer" || true
    rm -f "$work"/over-*.qcow2 "$work/peer.sock"
}
qcow2() { # SIZE DATA (or 0)
    rm -f "$work/peer.qcow2"
    qemu-img create -q -f qcow2 "$work/peer.qcow2" "$1"
    if [[ $2 != 0 ]]; then
        qemu-io -c "write -P 7 0 $2" "$work/peer.qcow2" >/dev/null
    fi
}
peer_row() { # HOW WHAT
    echo "| $1 | $2 | $(middle "$work/peer.took") |"
    : >"$work/peer.took"
}
: >"$work/peer.took"

cat <<PEERS

The same with what else there is, $(qemu-img --version | head -1), until it is durable:

| how | disk | ms |
|---|---|---|
PEERS
for case in "1G 0 1G,_empty" "1T 0 1T,_empty" "1T 1G 1T,_1_GiB_of_data"; do
    read -r size data what <<<"$case"
    qcow2 "$size" "$data"
    for ((i = 0; i < rounds; i++)); do
        start=$(now)
        qemu-img create -q -f qcow2 -F qcow2 -b "$work/peer.qcow2" "$work/child.qcow2"
        sync "$work/child.qcow2"
        since "$start" >>"$work/peer.took"
        rm "$work/child.qcow2"
    done
    peer_row "\`qemu-img create -b\`, source stopped" "${what//_/ }"
    overlays "$size"
    peer_row "\`blockdev-snapshot\`, in service" "${what//_/ }"
done
scattered() {
    fio --output-format=terse --name=f "--filename=$work/xfs/disk" --rw=randwrite --bs=4k \
        --blockalign=64k --size=8g --io_size=400m --direct=1 --ioengine=libaio --iodepth=32 \
        >/dev/null 2>&1
}
mkdir "$work/xfs"
if truncate -s 12G "$work/xfs.img" && mkfs.xfs -q -m reflink=1 "$work/xfs.img" 2>/dev/null &&
    mount -o loop "$work/xfs.img" "$work/xfs" 2>/dev/null; then
    for what in "1T, 2 GiB of data" "1T, 100,000 extents in no order"; do
        truncate -s 1T "$work/xfs/disk"
        if [[ $what == *GiB* ]]; then
            head -c 2G /dev/urandom | dd of="$work/xfs/disk" bs=1M conv=notrunc status=none
        else
            scattered
        fi
        sync -f "$work/xfs"
        for ((i = 0; i < rounds; i++)); do
            start=$(now)
            cp --reflink=always "$work/xfs/disk" "$work/xfs/copy"
            sync "$work/xfs/copy"
            since "$start" >>"$work/peer.took"
            rm "$work/xfs/copy"
        done
        peer_row "\`cp --reflink\` on XFS, source stopped" "$what"
        rm "$work/xfs/disk"
    done
else
    echo "fork: no XFS on a loop device here: \`cp --reflink\` is left out" >&2
fi
