#!/bin/bash
# Disks behind vhost-user sockets next to qemu-storage-daemon, as one section of Markdown (see
# run.sh). ROUNDS and SECONDS_EACH set how often and how long each is measured.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
if ! type -P qemu-storage-daemon >/dev/null; then
    echo "vhost_user: qemu-storage-daemon is not installed" >&2
    exit 1
fi
(cd "$top" && cargo build --release --quiet --package offshoot-benches --bin vhost_user)
cat <<END
## Disks behind vhost-user sockets, next to qemu-storage-daemon

Both serve the same content to the same client (\`vhost/src/client\`), which takes turns between them
within one run: ours, peer, ours, … Every cell is a median of ${ROUNDS:-5} rounds of
${SECONDS_EACH:-1.5} s; a ratio is that of neighbouring measurements, with the lowest and the highest
in brackets (above 1.00: ours does more). CPU is user and system time of the server process for each
request. Nothing is pinned; both servers poll for 32 µs at most; $(qemu-storage-daemon --version |
    head -1), one iothread, \`aio=io_uring\`, every layer given explicitly. The client runs on the same
processors, so at full load it is measured, too.
END
TMPDIR=${BENCH_DIR:-/var/tmp} "${CARGO_TARGET_DIR:-$top/target}/release/vhost_user" \
    --rounds "${ROUNDS:-5}" --seconds "${SECONDS_EACH:-1.5}"
