# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # the other parts set them, and use them
# The part of the demo that boots a whole machine under forkd, on a disk of blockd, and forks it while
# it runs: disk and memory at one instant.
#
# Sourced by ../demo.sh. The machine runs a small kernel of this project, so that it runs under any
# KVM. It counts: each number goes to its disk and, when the disk has it, to memory. At any one
# instant the disk has the number of memory, or the next one; a child that finds anything else says
# how many are wrong. What is typed on its console makes it stop and answer.

machines=32
machine_mib=512
# Of that, what it writes before it is forked: pages of 4 KiB from 8 MiB on.
machine_pages=$(((machine_mib - 16) * 256))
forkd=
why_no_machine=
# Milliseconds of the fork: the parent stood, all children ran, all of it was durable.
machine_pause='' machines_run='' machines_durable=''
machine_private=

can_run_machine() {
    if [[ ! -w /dev/kvm ]]; then
        why_no_machine="there is no KVM here that this user can use (/dev/kvm)"
        return 1
    fi
}

build_kernel() {
    cargo run ${CI:+--locked} --quiet --release --package offshoot-tests --bin demo_kernel \
        --manifest-path "$top/Cargo.toml" >"$work/kernel"
}

start_daemons() {
    start_daemon
    "${offshoot%/*}/forkd" --state "$work/machines" --blockd "$work/api.sock" \
        --api "$work/forkd.sock" --pool-size "$machines" >>"$work/daemon.log" 2>&1 &
    forkd=$!
    until vm status; do
        kill -0 "$forkd"
        sleep 0.05
    done
}

vm() { offshoot --forkd "$work/forkd.sock" vm "$@"; }

# Types a line on a machine's console, and prints the first of its lines that begins so; then
# types another line, if there is one, and prints the answer to that.
ask_machine() { # NAME LINE BEGIN [LINE]
    local line process from to found=1
    coproc console { exec timeout 60 "$offshoot" --store "$work/store" \
        --forkd "$work/forkd.sock" vm console "$1" 2>/dev/null; }
    from=${console[0]} to=${console[1]} process=$console_PID
    [[ -z $2 ]] || echo "$2" >&"$to"
    while IFS= read -r line <&"$from"; do
        line=${line%$'\r'}
        if [[ $line == "= $3"* ]]; then
            echo "${line#= }"
            found=0
            break
        fi
    done
    if ((found == 0)) && [[ -n ${4:-} ]]; then
        echo "$4" >&"$to"
        IFS= read -r line <&"$from"
        line=${line%$'\r'}
        echo "${line#= }"
    fi
    kill "$process" 2>/dev/null || true
    wait "$process" 2>/dev/null || true
    return $found
}

word_after() { # KEY LINE
    sed -nE "s/.*\\b$1 ([^ ]+).*/\\1/p" <<<"$2"
}

boot_machine() {
    offshoot disk create count --size 16M
    vm run parent --kernel "$work/kernel" --disk count --mem "${machine_mib}M"
    ask_machine parent '' ready
    ask_machine parent "f $((8 << 20)) $machine_pages 1" "$machine_pages"
    ask_machine parent w writing
    # Shells for its children.
    until vm status | grep -q "$machines of $machines"; do sleep 0.05; done
}

fork_machine() {
    local names=() i
    for ((i = 1; i <= machines; i++)); do names+=("child$i"); done
    vm fork parent "${names[@]}" --json >"$work/forked.json"
    machine_pause=$(ms "$(field pause_us <"$work/forked.json")")
    machines_run=$(ms "$(field ready_us <"$work/forked.json")")
    machines_durable=$(ms "$(field took_us <"$work/forked.json")")
    detail=": it stood for $machine_pause ms, all of them ran after $machines_run ms, and all was"
    detail+=" durable after $machines_durable ms"
}

weigh_machines() {
    vm stats --json >"$work/stats.json"
    local bytes
    bytes=$(awk -F'[:,]' '/"name"/ { child = $2 ~ /child/ }
        /"private_bytes"/ && child { sum += $2 } END { printf "%d", sum }' "$work/stats.json")
    machine_private=$((bytes / machines / 1024))
    detail=": $machine_private KiB of its own on average, of $machine_mib MiB"
}

verify_machine() { # NAME
    local log again identity random
    # It found that it is somebody else, and compared its disk with its memory.
    log=$(ask_machine "$1" '' forked)
    [[ $(word_after wrong "$log") == 0 ]]
    # It stops counting, and compares once more.
    again=$(ask_machine "$1" '!' wrote)
    [[ $(word_after wrong "$again") == 0 ]]
    (($(word_after ram "$again") >= $(word_after ram "$log")))
    { read -r identity && read -r random; } < <(ask_machine "$1" i name n)
    [[ $(word_after name "$identity") == "$1" ]]
    echo "$(word_after ram "$log") $(word_after generation "$identity")" \
        "$(word_after mac "$identity") $random" >>"$work/identities"
    # It never sleeps, and the others need the processors.
    vm pause "$1"
}

verify_machines() {
    local i column
    : >"$work/identities"
    for ((i = 1; i <= machines; i++)); do verify_machine "child$i"; done
    # All counted on from one instant; nothing else is the same.
    for column in 2 3 4; do
        (($(cut -d' ' -f"$column" "$work/identities" | sort -u | wc -l) == machines))
    done
}

parent_went_on() {
    local log
    log=$(ask_machine parent '!' wrote)
    [[ $(word_after wrong "$log") == 0 ]]
    (($(word_after ram "$log") > $(cut -d' ' -f1 "$work/identities" | sort -n | tail -n 1)))
    detail=": it has written $(word_after ram "$log") numbers"
}

remove_machines() {
    local i
    for ((i = 1; i <= machines; i++)); do vm rm "child$i" --force; done
    vm rm parent --force
    # Disks of the guests before have names like child-1.
    [[ $(offshoot disk ls | grep -c '^child[0-9]*-disk' || true) == 0 ]]
    offshoot disk check count
    kill -TERM "$forkd"
    wait "$forkd"
    forkd=
    offshoot daemon stop
    wait "$daemon"
    daemon=
}

show_machines() {
    echo "A whole machine"
    step "built a small kernel that runs under any KVM" build_kernel
    step "started blockd, and forkd beside it" start_daemons
    step "booted it with $machine_mib MiB, all of it written; it counts on its disk" boot_machine
    step "forked it into $machines machines while it runs" fork_machine
    step "memory of a child" weigh_machines
    step "each child has its disk and memory of one instant, and is nobody else" verify_machines
    show disk show child1-disk0
    step "the parent never stopped" parent_went_on
    step "removed all of them; nothing is left of the children" remove_machines
}

sum_up_machines() {
    echo "  - a running machine forked into $machines, disk and memory at one instant, in" \
        "$machines_run ms; it stood for $machine_pause ms"
    echo "  - a child takes $machine_private KiB of $machine_mib MiB; each verified its disk and" \
        "memory, and has an identity of its own"
}
