#!/bin/bash
# Runs benchmarks and puts their results together: benches/run.sh [NAME...]
#
# A benchmark is a script benches/NAME.sh that prints one section of Markdown, from a line `## …` on,
# and nothing else, to standard output; what it says on the way goes to standard error. This script
# keeps the section as benches/results/NAME.md, with a line that says when, from which commit and on
# which machine, and writes benches/RESULTS.md anew from all sections there are. Without names all
# benchmarks run. A benchmark that fails keeps its old section, and the run fails at its end.
set -euo pipefail

cd "$(dirname "$0")"
mkdir -p results

# The folder that the benchmarks work in decides which file system and device are measured.
export BENCH_DIR=${BENCH_DIR:-/var/tmp}

facts() {
    local cpu memory file_system
    cpu=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)
    memory=$(awk '/^MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo)
    file_system=$(stat -f -c %T "$BENCH_DIR")
    echo "$(nproc) × $cpu, $memory of memory, Linux $(uname -r), $file_system," \
        "load $(cut -d' ' -f1 /proc/loadavg) at the start"
}

commit() {
    local changed=
    [[ -z $(git status --porcelain --untracked-files=no -- ..) ]] || changed=', with changes'
    echo "$(git rev-parse --short HEAD)$changed"
}

names=("$@")
if [[ ${#names[@]} == 0 ]]; then
    for script in *.sh; do
        [[ $script == run.sh ]] || names+=("${script%.sh}")
    done
fi

failed=()
for name in "${names[@]}"; do
    echo "bench: $name" >&2
    about="_$(date -u +%F), commit $(commit): $(facts). Run: \`benches/run.sh $name\`._"
    if section=$("./$name.sh"); then
        { head -1 <<<"$section"; printf '\n%s\n' "$about"; tail -n +2 <<<"$section"; } \
            >"results/$name.md"
    else
        failed+=("$name")
    fi
done

{
    cat <<'END'
# Results

Written by `benches/run.sh` from the sections in `benches/results/`; do not edit. Each section says
when and where it was measured, and how to measure it again.
END
    for section in results/*.md; do
        echo
        # Graphs lie beside the section.
        sed 's#](\([^/)]*\.svg\))#](results/\1)#' "$section"
    done
} >RESULTS.md

if [[ ${#failed[@]} -gt 0 ]]; then
    echo "bench: failed: ${failed[*]}" >&2
    exit 1
fi
