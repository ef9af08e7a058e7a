#!/bin/bash
# Import and export of 1 GiB next to `qemu-img convert`, interleaved in one run: ours, peer, ours, …
# Prints the times in milliseconds, the medians and the ratio (above 1.0: ours is faster).
#
# Both ends are cached by the host. Ours makes everything durable before it ends; the peer runs twice,
# as it is by default (never syncs) and with `-t writeback` (syncs at the end, as ours does).
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
rounds=${ROUNDS:-7}
work=$(mktemp -d "${TMPDIR:-/var/tmp}/offshoot-bench.XXXXXX")
trap 'rm -rf "$work"' EXIT
offshoot=${OFFSHOOT:-}
if [[ -z $offshoot ]]; then
    (cd "$top" && cargo build --release --quiet --package offshoot)
    offshoot=${CARGO_TARGET_DIR:-$top/target}/release/offshoot
fi
export OFFSHOOT_STORE="$work/store"
"$offshoot" --quiet init

head -c 1G /dev/urandom >"$work/src.raw"
qemu-img convert -O qcow2 "$work/src.raw" "$work/src.qcow2"
"$offshoot" --quiet disk import "$work/src.raw" stay
cat "$work/src.raw" "$work/src.qcow2" >/dev/null

ms() { # COMMAND...: its time in milliseconds
    local start=${EPOCHREALTIME/[.,]/}
    "$@" >/dev/null
    echo $(((${EPOCHREALTIME/[.,]/} - start) / 1000))
}

median() { tr ' ' '\n' <<<"$*" | sort -n | sed -n "$((($# + 1) / 2))p"; }

compare() { # WHAT OURS PEER CLEAN: three functions, run in turn
    local what=$1 ours=() peer=() synced=()
    for ((i = 0; i < rounds; i++)); do
        "$4"; sync -f "$work"; ours+=("$(ms "$2")")
        "$4"; sync -f "$work"; peer+=("$(ms "$3" unsafe)")
        "$4"; sync -f "$work"; synced+=("$(ms "$3" writeback)")
    done
    local a b c
    a=$(median "${ours[@]}") b=$(median "${peer[@]}") c=$(median "${synced[@]}")
    printf '| %s | %s [%s] | %s [%s] | %s [%s] | %s | %s |\n' "$what" "$a" "${ours[*]}" \
        "$b" "${peer[*]}" "$c" "${synced[*]}" \
        "$(awk "BEGIN { printf \"%.2f\", $b / $a }")" "$(awk "BEGIN { printf \"%.2f\", $c / $a }")"
}

clean() {
    "$offshoot" --quiet disk rm tmp 2>/dev/null || true
    rm -f "$work"/out.*
}
import_raw() { "$offshoot" --quiet disk import "$work/src.raw" tmp; }
import_qcow2() { "$offshoot" --quiet disk import "$work/src.qcow2" tmp; }
peer_raw_to_qcow2() { qemu-img convert -t "$1" -f raw -O qcow2 "$work/src.raw" "$work/out.qcow2"; }
peer_qcow2_to_qcow2() { qemu-img convert -t "$1" -O qcow2 "$work/src.qcow2" "$work/out.qcow2"; }
export_raw() { "$offshoot" --quiet disk export stay "$work/out.raw"; }
export_qcow2() { "$offshoot" --quiet disk export stay "$work/out.qcow2" --format qcow2; }
peer_to_raw() { qemu-img convert -t "$1" -O raw "$work/src.qcow2" "$work/out.raw"; }

echo '| 1 GiB of data | ours, ms [runs] | qemu-img, ms [runs] | qemu-img synced, ms [runs] | ratio | ratio, synced |'
echo '|---|---|---|---|---|---|'
compare 'import raw' import_raw peer_raw_to_qcow2 clean
compare 'import qcow2' import_qcow2 peer_qcow2_to_qcow2 clean
compare 'export raw' export_raw peer_to_raw clean
compare 'export qcow2' export_qcow2 peer_qcow2_to_qcow2 clean
