#!/bin/bash
# Disks behind vhost-user sockets next to qemu-storage-daemon, as one section of Markdown (see
# run.sh), with graphs in results/. ROUNDS and SECONDS_EACH set how often and how long each is
# measured, ONLY the jobs by a part of their name. Reads by depth are in depth.sh.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
for program in qemu-storage-daemon qemu-img qemu-io; do
    if ! type -P "$program" >/dev/null; then
        echo "vhost_user: $program is not installed" >&2
        exit 1
    fi
done
(cd "$top" && cargo build --release --quiet --package offshoot-benches --bin vhost_user)
cat <<END
## Disks behind vhost-user sockets, next to qemu-storage-daemon

Both serve the same content to the same client (\`vhost/src/client\`), which takes turns between them
within one run: ours, peer, ours, … Every cell is a median of ${ROUNDS:-5} rounds of
${SECONDS_EACH:-1.5} s, or of first writes until every place was written. A ratio is that of
neighbouring measurements, with the lowest and the highest in brackets (above 1.00: ours does more).
CPU is user and system time of the server process, its threads in the kernel included, for each
request; what the kernel writes back later on its own is in no figure. Nothing is pinned unless a row
says so; both servers poll for 32 µs at most; $(qemu-storage-daemon --version | head -1), one iothread,
\`aio=io_uring\`, the same cache mode on both sides, every layer given explicitly. The client runs on
the same processors, so at full load it is measured, too.
END
mkdir -p "$top/benches/results"
TMPDIR=${BENCH_DIR:-/var/tmp} "${CARGO_TARGET_DIR:-$top/target}/release/vhost_user" \
    --rounds "${ROUNDS:-5}" --seconds "${SECONDS_EACH:-1.5}" --only "${ONLY:-!by depth}" \
    --graphs "$top/benches/results"
