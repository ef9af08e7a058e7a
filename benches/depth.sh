#!/bin/bash
# What a read costs by the depth of the chain below a disk, next to qcow2 behind
# qemu-storage-daemon, as one section of Markdown (see run.sh), with a graph in results/. ROUNDS and
# SECONDS_EACH as for vhost_user.sh.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
for program in qemu-storage-daemon qemu-img; do
    if ! type -P "$program" >/dev/null; then
        echo "depth: $program is not installed" >&2
        exit 1
    fi
done
cd "$top"
# The daemon that is measured, built like the benchmark itself.
cargo build --release --quiet --workspace --bin blockd --bin vhost_user
cat <<END
## Reads by depth

Served over vhost-user to one client, which takes turns between ours and the peer; medians of
${ROUNDS:-5} rounds of ${SECONDS_EACH:-1.5} s, ratios of neighbouring measurements with the lowest and
the highest in brackets. The peer is $(qemu-storage-daemon --version | head -1) with
every layer given explicitly.
END
TMPDIR=${BENCH_DIR:-/var/tmp} OFFSHOOT_PROGRAMS_BUILT=1 \
    "${CARGO_TARGET_DIR:-$top/target}/release/vhost_user" \
    --rounds "${ROUNDS:-5}" --seconds "${SECONDS_EACH:-1.5}" --only "by depth" \
    --graphs "$top/benches/results"
