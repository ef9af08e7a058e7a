#!/bin/bash
# What a fork of a running machine costs, without disks, as one section of Markdown (see run.sh).
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
(cd "$top" && cargo build --release --quiet --package offshoot-benches --bin vm_fork)
exec "${CARGO_TARGET_DIR:-$top/target}/release/vm_fork" "${MEMORY_MIB:-512}" "${ROUNDS:-20}"
