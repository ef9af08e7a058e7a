#!/bin/bash
# Disks behind NBD next to qemu-nbd, as one section of Markdown (see run.sh).
#
# The same bytes, as a disk without a parent in our store and as a raw file, both in the page cache;
# fio's NBD engine (job files in fio/) takes turns between the two servers. ROUNDS and SECONDS_EACH
# set how often and how long each job is run.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
rounds=${ROUNDS:-5}
export SECONDS_EACH=${SECONDS_EACH:-2} RANGE=512m
if ! fio --enghelp 2>/dev/null | grep -qw nbd; then
    echo "nbd: fio is not installed, or has no NBD engine" >&2
    exit 1
fi
if ! type -P qemu-nbd >/dev/null; then
    echo "nbd: qemu-nbd is not installed" >&2
    exit 1
fi
work=$(mktemp -d "${BENCH_DIR:-/var/tmp}/offshoot-bench.XXXXXX")
(cd "$top" && cargo build --release --quiet --package offshoot --package blockd)
bin=${CARGO_TARGET_DIR:-$top/target}/release
export OFFSHOOT_STORE="$work/store"

peer=
clean() {
    [[ -z $peer ]] || kill "$peer" 2>/dev/null || true
    "$bin/offshoot" --quiet daemon stop 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT

head -c "$RANGE" /dev/urandom >"$work/raw.img"
# Both files come into the page cache by being read: the kernel keeps what was read ahead in larger
# pieces than what was written in small ones, and a small write to a large piece costs it more.
sync "$work/raw.img"
dd if="$work/raw.img" iflag=nocache count=0 status=none
"$bin/offshoot" --quiet init
"$bin/offshoot" --quiet disk import "$work/raw.img" vm
PATH="$bin:$PATH" "$bin/offshoot" --quiet daemon start --socket-dir "$work"
"$bin/offshoot" --quiet disk export-nbd vm --socket "$work/ours.sock"
ours=$("$bin/offshoot" --json daemon status | sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' | head -1)
qemu-nbd --format raw --cache writeback --aio io_uring --discard unmap --persistent --shared 8 \
    --export-name vm --socket "$work/peer.sock" "$work/raw.img" &
peer=$!
for _ in $(seq 100); do
    [[ ! -S $work/peer.sock ]] || break
    sleep 0.1
done

ticks() { # PID: hundredths of a second of processor time
    sed 's/.*) //' "/proc/$1/stat" | awk '{ print $12 + $13 }'
}

# JOB NAME PID: one line with requests in a second, p50 and p99 in µs, CPU µs for each request.
measure() {
    local before after
    cat "$work"/raw.img "$work"/store/*.seg >/dev/null
    before=$(ticks "$3")
    URI="nbd+unix:///vm?socket=$work/$2.sock" \
        fio --output-format=terse "$top/benches/fio/nbd-$1.fio" >"$work/fio.out"
    after=$(ticks "$3")
    # Fields of the terse format, version 3: requests, requests in a second and percentiles of
    # reads, then of writes 41 fields on.
    grep '^3;' "$work/fio.out" | awk -F ';' -v ticks=$((after - before)) '{
        at = $8 > 0 ? 0 : 41
        for (i = 18 + at; i < 38 + at; i++) {
            split($i, pair, "%=")
            if (pair[1] + 0 == 50) p50 = pair[2]
            if (pair[1] + 0 == 99) p99 = pair[2]
        }
        iops = $(8 + at)
        printf "%.0f %.0f %.0f %.1f\n", iops, p50, p99, ticks * 1e4 / (iops * $(9 + at) / 1e3)
    }'
}

cat <<END
## Disks behind NBD, next to qemu-nbd

The same 512 MiB without a parent, through the page cache on both sides, one connection on a Unix
socket, $(fio --version), $(qemu-nbd --version | head -1). Servers take turns; every cell is a median of
$rounds rounds of $SECONDS_EACH s; a ratio is that of neighbouring measurements, with the lowest and the
highest in brackets (above 1.00: ours does more). CPU is user and system time of the server process.

| job | ours, IOPS | qemu-nbd, IOPS | ratio [spread] | ours p50/p99 µs | qemu-nbd p50/p99 µs | ours CPU µs/IO | qemu-nbd CPU µs/IO |
|---|---|---|---|---|---|---|---|
END
for job in 4k-randread 4k-randwrite 4k-randread-depth1 4k-write-flush 128k-read 128k-write; do
    for _ in $(seq "$rounds"); do
        echo "$(measure "$job" ours "$ours") $(measure "$job" peer "$peer")"
    done | awk -v job="$job" '
        function middle(values, n,  i, j, t) {
            for (i = 2; i <= n; i++)
                for (j = i; j > 1 && values[j - 1] > values[j]; j--) {
                    t = values[j]; values[j] = values[j - 1]; values[j - 1] = t
                }
            return values[int(n / 2) + 1]
        }
        { for (i = 1; i <= 8; i++) cell[i, NR] = $i; ratio[NR] = $1 / $5 }
        END {
            for (i = 1; i <= 8; i++) {
                for (r = 1; r <= NR; r++) column[r] = cell[i, r]
                m[i] = middle(column, NR)
            }
            r = middle(ratio, NR)
            printf "| %s | %d | %d | **%.2f** [%.2f–%.2f] | %d/%d | %d/%d | %.1f | %.1f |\n",
                job, m[1], m[5], r, ratio[1], ratio[NR], m[2], m[3], m[6], m[7], m[4], m[8]
        }'
done
