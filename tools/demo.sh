#!/bin/bash
# Shows on a temporary store, with real tools beside it, that Offshoot keeps what it is given.
#
# First the command line alone: a file system made from this machine's own files goes through QEMU's
# tools into a chain of qcow2 images, from there into a store, gets a child that is written to and
# killed in mid-write again and again, and comes back out. Every step is checked by content against
# QEMU's view.
#
# Then the daemon: a Linux guest in QEMU boots from a delta disk over vhost-user, makes a file
# system on a second one, and writes to it while the daemon under it is killed again and again. The
# guest compares what it reads with checksums that it keeps in its own memory. Then its disks are
# forked while it writes, each child is booted and verified, and they are flattened under it.
#
# Last a whole machine: forkd boots one on a disk of blockd, and forks it, disk and memory at one
# instant, into 32 machines while it runs. Each verifies its disk and memory and says who it is.
#
# On a machine that cannot run a guest the demo says so, and shows the rest. These parts are in
# demo/.
#
# The first step that fails ends the demo with its output and a non-zero exit code. Nothing is left
# behind.
#
# OFFSHOOT names another binary to use, with blockd beside it; without it the release build is made
# first.

set -euo pipefail
shopt -s inherit_errexit

PATH="$PATH:/usr/sbin:/sbin"
top=$(cd "$(dirname "$0")/.." && pwd)
kills=5
slots=4000
slot_bytes=65536
# The file system ends at 512 MiB; the child's own writes go behind it.
disk_bytes=$((1 << 30))
first_slot=$((600 << 20))
large_offset=$((900 << 20))
large_bytes=$((32 << 20))
why_no_guest=
# What a step that ran has to add to what is said about it.
detail=

work=$(mktemp -d "${TMPDIR:-/tmp}/offshoot-demo.XXXXXX")
tail_dir=$(mktemp -d /dev/shm/offshoot-demo.XXXXXX)
log="$work/log"
writer=
daemon=
# Where to complain, whatever the step that failed had redirected.
exec 3>&2

# shellcheck source=tools/demo/guest.sh
source "$top/tools/demo/guest.sh"
# shellcheck source=tools/demo/forks.sh
source "$top/tools/demo/forks.sh"
# shellcheck source=tools/demo/machines.sh
source "$top/tools/demo/machines.sh"

stop_writer() {
    if [[ -n $writer ]]; then
        kill -9 -- "-$writer" 2>/dev/null || true
        wait "$writer" 2>/dev/null || true
        writer=
    fi
}

stop_processes() {
    stop_writer
    for process in "${guests[@]}" $forkd $daemon; do
        kill -9 "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
    # Machines outlive the daemon that started them.
    pkill -9 -f -- "$work/machines" 2>/dev/null || true
}

finish() {
    local code=$?
    trap - EXIT
    stop_processes
    if ((code != 0)); then
        echo >&3
        tail -n 30 "$log" "$work"/{daemon.log,*.qemu.log,*.console} 2>/dev/null >&3 || true
        echo "demo: FAILED in: ${doing:-start}" >&3
    fi
    rm -rf "$work" "$tail_dir"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

now_ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

step() { # WHAT COMMAND...: runs the command quietly, says what it showed and how long it took
    local start what=$1
    shift
    doing=$what
    detail=
    start=$(now_ms)
    "$@" >>"$log" 2>&1
    local took=$(($(now_ms) - start))
    printf '  %3d.%02d s  %s\n' $((took / 1000)) $((took % 1000 / 10)) "$what$detail"
}

show() { # COMMAND...: runs the command and shows its output
    doing="offshoot $*"
    echo
    echo "  \$ offshoot $*"
    offshoot "$@" 2>&1 | tee -a "$log" | sed 's/^/    /'
    echo
}

offshoot() { "$offshoot" --store "$work/store" "$@"; }

# Fails when the command succeeds, or when it fails without saying WORD.
refused() { # WORD COMMAND...
    local word=$1 said
    shift
    if said=$("$@" 2>&1); then
        echo "$said"
        echo "this should have been refused: $*"
        return 1
    fi
    echo "$said"
    grep -q "$word" <<<"$said"
}

make_file_system() {
    mkdir "$work/files"
    find /usr/share /usr/lib -xdev -type f -readable -size -512k -print0 2>/dev/null |
        sort -z >"$work/all" || true
    head -z -n 6000 "$work/all" >"$work/list"
    tar -C / --null --no-unquote -T "$work/list" -cf - 2>/dev/null | tar -C "$work/files" -xf -
    mke2fs -q -t ext4 -d "$work/files" "$work/base.raw" 512M
    truncate -s "$disk_bytes" "$work/base.raw"
    # The file to look for at the end: the largest one that was packed.
    sample=$(cd "$work/files" && find . -type f -printf '%s %P\n' | sort -n | tail -n 1 |
        cut -d' ' -f2-)
}

make_chain() {
    qemu-img convert -c -O qcow2 "$work/base.raw" "$work/base.qcow2"
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 "$work/middle.qcow2"
    qemu-io -c 'write -P 0x5a 530M 8M' -c 'write -P 0x11 560M 4M' "$work/middle.qcow2"
    qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 "$work/top.qcow2"
    qemu-io -c 'write -z 532M 2M' -c 'discard 560M 1M' "$work/top.qcow2"
    qemu-img convert -O raw "$work/top.qcow2" "$work/golden.raw"
}

offset_of() { echo $((first_slot + $1 * slot_bytes)); }

content_of() { # SLOT: 64 KiB that no other slot holds
    yes "slot $1 of the demo" 2>/dev/null | head -c "$slot_bytes" || true
}

write_slot() {
    content_of "$1" |
        offshoot disk write child --offset "$(offset_of "$1")" --length "$slot_bytes"
}

# Writes slot after slot from the one given, and notes each that was acknowledged.
write_on() {
    local slot
    for ((slot = $1; slot < slots; slot++)); do
        write_slot "$slot" || return
        echo "$slot" >>"$work/acknowledged"
    done
}

large_content() { yes 'one large write' 2>/dev/null | head -c "$large_bytes" || true; }

write_large() {
    offshoot disk write child --offset "$large_offset" --length "$large_bytes"
}

# Half of the content comes at once, the rest never.
write_large_half() {
    { large_content | head -c $((large_bytes / 2)); sleep 60; } | write_large
}

kill_soon() { # COMMAND...: runs it, and kills it and what it started while it is at it
    set -m # a process group of its own
    "$@" &
    writer=$!
    set +m
    sleep "0.$((RANDOM % 5 + 4))"
    kill -0 "$writer"
    stop_writer
}

kill_in_mid_write() {
    : >"$work/acknowledged"
    for ((round = 1; round < kills; round++)); do
        kill_soon write_on "$(wc -l <"$work/acknowledged")"
    done
    kill_soon write_large_half
    acknowledged=$(wc -l <"$work/acknowledged")
    ((acknowledged > kills))
}

verify_acknowledged() {
    local slot
    while read -r slot; do
        offshoot disk read child --offset "$(offset_of "$slot")" --length "$slot_bytes" |
            cmp - <(content_of "$slot")
    done <"$work/acknowledged"
}

# The writes that a kill interrupted may have landed or not: repeat them, then QEMU's view is certain.
model_child() {
    local slot
    write_slot "$acknowledged"
    large_content | write_large
    cp --sparse=always "$work/golden.raw" "$work/child.raw"
    for ((slot = 0; slot <= acknowledged; slot++)); do
        content_of "$slot" | dd of="$work/child.raw" bs="$slot_bytes" conv=notrunc status=none \
            iflag=fullblock seek=$(($(offset_of "$slot") / slot_bytes))
    done
    large_content | dd of="$work/child.raw" bs="$slot_bytes" conv=notrunc status=none \
        iflag=fullblock seek=$((large_offset / slot_bytes))
}

same_as_model() {
    offshoot disk export child "$work/out.qcow2" --format qcow2
    offshoot disk export child "$work/out.raw" --format raw
    qemu-img compare "$work/out.qcow2" "$work/child.raw"
    qemu-img compare -f raw -F raw "$work/out.raw" "$work/child.raw"
}

look_inside() {
    e2fsck -fn "$work/out.raw"
    debugfs -R "dump \"/$sample\" $work/sample" "$work/out.raw"
    cmp "$work/sample" "$work/files/$sample"
}

main() {
    offshoot=${OFFSHOOT:-}
    if [[ -z $offshoot ]]; then
        doing="cargo build"
        cargo build ${CI:+--locked} --quiet --release --package offshoot --package blockd --package forkd \
            --manifest-path "$top/Cargo.toml"
        offshoot="${CARGO_TARGET_DIR:-$top/target}/release/offshoot"
    fi
    local start
    start=$(now_ms)

    echo "A real image"
    step "made an ext4 file system from this machine's files" make_file_system
    step "turned it into three qcow2 images, the lowest one compressed" make_chain
    echo "Into the store"
    step "made a store" offshoot init --tail-dir "$tail_dir"
    step "imported the chain as disk golden" offshoot disk import "$work/top.qcow2" golden
    step "golden holds what QEMU reads" offshoot disk compare golden "$work/golden.raw"
    step "sealed golden: it can be shared, and never changes again" offshoot disk seal golden
    step "made its child" offshoot disk create child --parent golden
    show disk ls
    show disk show child
    step "deleting golden is refused: child needs it" refused child offshoot disk rm golden
    echo "kill -9"
    step "killed a writer to child in mid-write, $kills times" kill_in_mid_write
    step "the metadata of child is whole" offshoot disk check child
    step "every one of the $acknowledged acknowledged writes is there" verify_acknowledged
    step "golden did not change" offshoot disk compare golden "$work/golden.raw"
    step "child and golden differ" refused differ offshoot disk compare child golden
    echo "Out of the store"
    step "QEMU's model of child got the same writes" model_child
    step "exports of child as qcow2 and raw: qemu-img says identical" same_as_model
    step "the file system in it is clean, and a file in it is the original" look_inside
    if can_run_guest; then
        show_guest
        show_forks
        show_end_of_guest
    fi
    if can_run_machine; then
        show_machines
    fi
    show store df
    local took=$(($(now_ms) - start))
    echo "Shown in $((took / 1000)) s:"
    echo "  - import, seal, child, export: the contents are what QEMU's tools read"
    echo "  - $kills kills of a writer in mid-write: $acknowledged acknowledged writes, all there"
    if [[ -n $why_no_guest ]]; then
        echo "NOT shown, because $why_no_guest:"
        echo "  - a guest on the daemon, kills of the daemon under it, and forks of its disks"
    else
        echo "  - a Linux guest booted from a child of a sealed disk, over vhost-user"
        echo "  - $daemon_kills kills of the daemon under the writing guest, which went on and" \
            "reads what it wrote"
        sum_up_forks
    fi
    if [[ -n $why_no_machine ]]; then
        echo "NOT shown, because $why_no_machine:"
        echo "  - a whole machine, forked with its memory"
    else
        sum_up_machines
    fi
    echo "Nothing is left behind."
}

main
