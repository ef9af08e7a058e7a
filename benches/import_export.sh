#!/bin/bash
# Import and export of 1 GiB next to `qemu-img convert`, as one section of Markdown (see run.sh).
#
# Three take turns within each round, and each round begins with another one, so that a slow minute
# of the machine hits all of them:
#   ours      `offshoot disk import` or `export`, which ends when the result is durable;
#   plain     `qemu-img convert` as it is by default, which ends before anything is durable;
#   synced    `qemu-img convert` and then `sync` of the file it made.
# Nothing is dropped from any cache: source images, and the disk that is exported, were read just
# before; between two runs the file system is synced, so that nobody pays for what another left
# dirty.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
rounds=${ROUNDS:-7}
work=$(mktemp -d "${BENCH_DIR:-/var/tmp}/offshoot-bench.XXXXXX")
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

clean() {
    "$offshoot" --quiet disk rm tmp 2>/dev/null || true
    rm -f "$work"/out
    cat "$work"/src.* "$work"/store/*.seg >/dev/null
    sync -f "$work"
}

ms() { # COMMAND...: its time in milliseconds
    clean
    local start=${EPOCHREALTIME/[.,]/}
    "$@" >/dev/null
    echo $(((${EPOCHREALTIME/[.,]/} - start) / 1000))
}

ours() { # DIRECTION FORMAT
    case $1 in
    import) "$offshoot" --quiet disk import "$work/src.$2" tmp --format "$2" ;;
    export) "$offshoot" --quiet disk export stay "$work/out" --format "$2" ;;
    esac
}

# What an import is next to: into qcow2, the peer's own format; and an export: out of it.
plain() { # DIRECTION FORMAT
    case $1 in
    import) qemu-img convert -f "$2" -O qcow2 "$work/src.$2" "$work/out" ;;
    export) qemu-img convert -f qcow2 -O "$2" "$work/src.qcow2" "$work/out" ;;
    esac
}

synced() { # DIRECTION FORMAT
    plain "$@"
    sync "$work/out"
}

# Medians in milliseconds with best and worst, and the ratios of the peers to ours: of the medians,
# and the lowest and highest of a round.
compare() { # DIRECTION FORMAT
    local order=(ours plain synced) who i
    : >"$work/times"
    for ((i = 0; i < rounds; i++)); do
        for who in "${order[@]:i % 3}" "${order[@]:0:i % 3}"; do
            echo "$who $i $(ms "$who" "$1" "$2")" >>"$work/times"
        done
    done
    echo "$1 $2: $(tr '\n' ';' <"$work/times")" >&2
    sort -k1,1 -k3,3n "$work/times" | awk -v what="$1 $2" '
        { n[$1]++; time[$1, n[$1]] = $3; round[$1, $2] = $3 }
        function middle(who) { return time[who, int((n[who] + 1) / 2)] }
        function show(who) {
            return sprintf("%d [%d, %d]", middle(who), time[who, 1], time[who, n[who]])
        }
        function ratio(who,    i, r, low, high) {
            for (i = 0; i < n[who]; i++) {
                r = round[who, i] / round["ours", i]
                if (i == 0 || r < low) low = r
                if (i == 0 || r > high) high = r
            }
            return sprintf("%.2f [%.2f, %.2f]", middle(who) / middle("ours"), low, high)
        }
        END {
            printf "| %s | %s | %s | %s | %s | %s |\n", what, show("ours"), show("synced"),
                show("plain"), ratio("synced"), ratio("plain")
        }'
}

cat <<END
## Import and export of 1 GiB next to qemu-img

Random bytes, $rounds rounds, times in ms: median [best, worst]. A ratio above 1 says that ours took
less time: that of the medians [lowest, highest of a round]. Ours ends when the result is durable.
*synced* is \`qemu-img convert … && sync FILE\`, which ends when its result is; *plain* is
\`qemu-img convert\` alone, which ends before the result is on the device. An import is compared with
a conversion to qcow2, an export with one from qcow2. What is read is in the page cache at the start.

| 1 GiB | ours | synced | plain | ratio, synced | ratio, plain |
|---|---|---|---|---|---|
END
compare import raw
compare import qcow2
compare export raw
compare export qcow2
printf '\n%s, %s.\n' "$(qemu-img --version | head -1)" "$("$offshoot" --version)"
