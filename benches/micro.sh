#!/bin/bash
# Micro-benchmarks of the engine, as one section of Markdown (see run.sh).
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$top/target}
export TMPDIR=${BENCH_DIR:-/var/tmp}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# What an earlier run left must not show up as measured now.
rm -rf "$target/criterion"
(cd "$top" && cargo bench --package offshoot-benches --bench micro) 2>&1 | tee "$log" >&2

# Nanoseconds per operation, one line for each sample, sorted.
samples() { # SAMPLE.JSON
    local iters times
    iters=$(sed 's/.*"iters":\[\([^]]*\)\].*/\1/' "$1" | tr ',' '\n')
    times=$(sed 's/.*"times":\[\([^]]*\)\].*/\1/' "$1" | tr ',' '\n')
    paste <(echo "$times") <(echo "$iters") | awk '{ printf "%.3f\n", $1 / $2 }' | sort -g
}

human() { # NANOSECONDS
    awk -v ns="$1" 'BEGIN {
        if (ns < 1e3) printf "%.1f ns", ns
        else if (ns < 1e6) printf "%.2f µs", ns / 1e3
        else printf "%.2f ms", ns / 1e6
    }'
}

cat <<'END'
## Micro-benchmarks

What each one does is said in `benches/benches/micro.rs`. A sample is one run or, for short
operations, the mean of many.

| benchmark | best | median | worst | samples |
|---|---|---|---|---|
END
find "$target/criterion" -path '*/new/sample.json' | sort -V | while read -r file; do
    name=${file#"$target/criterion/"}
    mapfile -t sorted < <(samples "$file")
    count=${#sorted[@]}
    printf '| %s | %s | %s | %s | %s |\n' "${name%/new/sample.json}" "$(human "${sorted[0]}")" \
        "$(human "${sorted[count / 2]}")" "$(human "${sorted[count - 1]}")" "$count"
done
echo
sed -n 's/^fact: /- /p' "$log"
