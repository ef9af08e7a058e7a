#!/bin/bash
# Runs fuzz targets on a stable compiler: no nightly, no cargo-fuzz; a C++ compiler builds the engine.
#
#   run.sh TARGET|all SECONDS   fuzz, starting from the kept corpus
#   run.sh TARGET FILE          try one input again, with a backtrace
#   run.sh TARGET|all keep      add what earlier runs found, and reaches further, to the kept corpus
#
# Prints one line per target, or, when a target fails, the end of its log and the one command that
# repeats the failure. The failing input stays in tests/fuzz/artifacts/TARGET.

set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
# The build has flags of its own and must not throw away what the workspace built.
build="${CARGO_TARGET_DIR:-$top/target}/fuzz"
triple=$(rustc -vV | sed -n 's/^host: //p')
binary="$build/$triple/release/fuzz"

die() { echo "fuzz: $*" >&2; exit 1; }

targets() { find "$here/corpus" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | sort; }

build() {
    # Coverage counters, the table of program counters and traced comparisons: what libFuzzer wants.
    local coverage=-Cllvm-args=-sanitizer-coverage
    export RUSTFLAGS="-Cpasses=sancov-module $coverage-level=4 $coverage-inline-8bit-counters \
        $coverage-pc-table $coverage-trace-compares -Ccodegen-units=1"
    # With --target the flags reach neither build scripts nor macros, which have no engine to link.
    CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true \
        cargo build --quiet ${CI:+--locked} --release --target "$triple" --target-dir "$build" \
        --manifest-path "$here/Cargo.toml" --features engine
}

# The negative control: an engine that cannot find a compared 64-bit constant tests nothing.
check_engine() {
    local log="$build/canary.log"
    if OFFSHOOT_FUZZ_TARGET=canary "$binary" -max_total_time=60 \
        -artifact_prefix="$build/canary-" >"$log" 2>&1; then
        die "the engine did not find the canary; instrumentation does not work (see $log)"
    fi
    grep -q 'the canary was found' "$log" || die "the engine does not run (see $log)"
}

fuzz() { # TARGET SECONDS
    local target=$1 seconds=$2
    local found="$build/corpus/$target" artifacts="$here/artifacts/$target"
    local log="$build/$target.log"
    mkdir -p "$found" "$artifacts"
    # New inputs go to the first directory; the kept corpus is only read.
    if OFFSHOOT_FUZZ_TARGET=$target "$binary" "$found" "$here/corpus/$target" \
        -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -max_len=65536 \
        -artifact_prefix="$artifacts/" -print_final_stats=1 >"$log" 2>&1; then
        local runs coverage
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        coverage=$(grep -o 'cov: [0-9]*' "$log" | tail -n 1 | cut -d' ' -f2)
        ((runs > 0)) || die "$target ran no input (see $log)"
        echo "fuzz: $target: $runs inputs in $seconds s, coverage ${coverage:-0}, no failure"
        return
    fi
    grep -v '^#[0-9]' "$log" | tail -n 40 | cut -c1-400 >&2
    local input
    input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
    echo "fuzz: $target FAILED; the whole log is $log" >&2
    if [[ -n $input ]]; then
        echo "fuzz: repeat with: make fuzz TARGET=$target INPUT=${input#"$top/"}" >&2
        echo "fuzz: once fixed, keep the input in tests/fuzz/corpus/$target" >&2
    fi
    return 1
}

repeat() { # TARGET FILE
    OFFSHOOT_FUZZ_TARGET=$1 RUST_BACKTRACE=1 exec "$binary" "$2"
}

keep() { # TARGET
    mkdir -p "$build/corpus/$1"
    OFFSHOOT_FUZZ_TARGET=$1 "$binary" -merge=1 -use_counters=0 -max_len=4096 \
        "$here/corpus/$1" "$build/corpus/$1" >"$build/$1.log" 2>&1 || die "see $build/$1.log"
    echo "fuzz: $1: $(find "$here/corpus/$1" -type f | wc -l) inputs in the kept corpus"
}

main() {
    (($# == 2)) || die "usage: run.sh TARGET|all SECONDS|keep, or run.sh TARGET FILE"
    local target=$1 what=$2 failed=0 names
    [[ $target == all || -d $here/corpus/$target ]] ||
        die "there is no target $target; there are: $(targets | tr '\n' ' ')"
    names=$(if [[ $target == all ]]; then targets; else echo "$target"; fi)
    build
    if [[ $what == keep ]]; then
        for name in $names; do keep "$name"; done
        return
    elif [[ ! $what =~ ^[0-9]+$ ]]; then
        [[ -f $what && $target != all ]] || die "$what is neither seconds nor an input for a target"
        repeat "$target" "$what"
    fi
    check_engine
    for name in $names; do
        fuzz "$name" "$what" || failed=1
    done
    return "$failed"
}

main "$@"
