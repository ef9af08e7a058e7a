#!/bin/bash
# What forks of a running machine with a disk cost through forkd and blockd, for one child and for
# hundreds, as one section of Markdown (see run.sh). MEMORY_MIB, ROUNDS and CHILDREN set how large
# the machine is, how many single forks are measured, and into how many children at once; PARTS is
# what is measured: all, or some of many,single,peer,after,row.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
if [[ ! -w /dev/kvm ]]; then
    echo "vm_scale: /dev/kvm cannot be used here" >&2
    exit 1
fi
cd "$top"
# The daemons and the command line that are measured, built like the benchmark itself.
cargo build --release --quiet --package blockd --package forkd --package offshoot --bins
cargo build --release --quiet --package offshoot-benches --bin vm_scale
read -ra children <<<"${CHILDREN:-1 10 100 400}"
# Stores are where run.sh says that they are.
export TMPDIR=${BENCH_DIR:-/var/tmp}
OFFSHOOT_PROGRAMS_BUILT=1 exec "${CARGO_TARGET_DIR:-$top/target}/release/vm_scale" \
    "${MEMORY_MIB:-512}" "${ROUNDS:-50}" "${PARTS:-all}" "${children[@]}"
