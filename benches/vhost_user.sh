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
cd "$top"
# The daemon that is measured, built like the benchmark itself.
cargo build --release --quiet --workspace --bin blockd --bin vhost_user
cat <<END
## Disks behind vhost-user sockets, next to qemu-storage-daemon

Both serve the same content to the same client (\`vhost/src/client\`), which takes turns between them
within one run: ours, peer, ours, … Every cell is a median of ${ROUNDS:-5} rounds of
${SECONDS_EACH:-1.5} s, or of first writes until every place was written. A ratio is that of
neighbouring measurements, with the lowest and the highest in brackets (above 1.00: ours does more).
CPU is user and system time of the server process, its threads in the kernel included, for each
request; what the kernel writes back later on its own is in no figure. Nothing is pinned unless a row
says so; both servers poll for 32 µs at most. The client runs on the same processors, so at full load
it is measured, too.

- Ours, sandbox included, as anybody runs it: \`blockd --store DIR --api SOCK --cache buffered\` (or
  \`direct\`), then \`offshoot disk attach disk --socket PATH --queues 2\`.
- The peer, $(qemu-storage-daemon --version | head -1), the same cache
  mode, every layer given explicitly: \`qemu-storage-daemon --object iothread,id=io0 --blockdev
  '{"driver":"raw","node-name":"n","discard":"unmap","file":{"driver":"file","filename":"raw.img",
  "cache":{"direct":false},"aio":"io_uring","discard":"unmap"}}' --export
  type=vhost-user-blk,id=e0,node-name=n,addr.type=unix,addr.path=PATH,writable=on,num-queues=2,iothread=io0\`
END
mkdir -p "$top/benches/results"
TMPDIR=${BENCH_DIR:-/var/tmp} OFFSHOOT_PROGRAMS_BUILT=1 \
    "${CARGO_TARGET_DIR:-$top/target}/release/vhost_user" \
    --rounds "${ROUNDS:-5}" --seconds "${SECONDS_EACH:-1.5}" --only "${ONLY:-!by depth}" \
    --graphs "$top/benches/results"
