#!/bin/bash
# Everything `make test` does after the set-up: all tests, a short fuzz run, and what was skipped.
#
# Every step runs even when one before it failed; the exit code is 0 only when all passed. What the
# failed tests said stays in failed-tests.log of the target folder.

set -uo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
target_dir="${CARGO_TARGET_DIR:-$top/target}"
fuzz_seconds=${FUZZ_SECONDS:-10}
failed=()

cd "$top" || exit 1
mkdir -p "$target_dir"
OFFSHOOT_SKIP_LOG=$(realpath "$target_dir")/skipped-tests.log
export OFFSHOOT_SKIP_LOG
: >"$OFFSHOOT_SKIP_LOG"

# The programs that tests start: built with the tests, and not once more by each of them.
cargo build ${CI:+--locked} --workspace --bins "$@" || failed+=("cargo build")
export OFFSHOOT_PROGRAMS_BUILT=1
cargo test ${CI:+--locked} --workspace --no-fail-fast "$@" 2>&1 | tee "$target_dir/tests.log" ||
    failed+=("cargo test")
# From the heading of each failed test to the list of their names.
awk '/^---- .* ----$/ { said = 1 } /^failures:$/ { said = 0 } said' "$target_dir/tests.log" \
    >"$target_dir/failed-tests.log"

tests/fuzz/run.sh all "$fuzz_seconds" || failed+=("fuzzing")

retried=$(grep '^RETRIED' "$OFFSHOOT_SKIP_LOG" || true)
if [[ -n $retried ]]; then
    echo "$retried"
    echo "test: $(wc -l <<<"$retried") begun anew, for the reasons above"
fi
skipped=$(grep '^SKIPPED' "$OFFSHOOT_SKIP_LOG" | sort -u)
if [[ -n $skipped ]]; then
    echo "$skipped"
    echo "test: $(wc -l <<<"$skipped") skipped, for the reasons above"
else
    echo "test: none skipped"
fi
sed -n 's/^---- \(.*\) stdout ----$/test: FAILED: \1/p' "$target_dir/failed-tests.log" >&2
for step in "${failed[@]}"; do
    echo "test: FAILED: $step" >&2
done
exit $((${#failed[@]} > 0))
