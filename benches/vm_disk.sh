#!/bin/bash
# What the path of a machine's disk costs, through an arena and direct, as one section of Markdown
# (see run.sh). ROUNDS sets how often each figure is measured.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
cd "$top"
# The daemons and the command line that are measured, built like the benchmark itself.
cargo build --release --quiet --package blockd --package forkd --package offshoot --bins
cargo build --release --quiet --package offshoot-benches --bin vm_disk
# A device would hide what is compared.
export TMPDIR=/dev/shm
OFFSHOOT_PROGRAMS_BUILT=1 exec "${CARGO_TARGET_DIR:-$top/target}/release/vm_disk" "${ROUNDS:-5}"
