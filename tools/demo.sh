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
# guest compares what it reads with checksums that it keeps in its own memory. On a machine that
# cannot run a guest the demo says so, and shows the rest.
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
# How often the daemon is killed under the guest, and how long the guest may take for one thing.
daemon_kills=3
guest_limit=90
why_no_guest=

work=$(mktemp -d "${TMPDIR:-/tmp}/offshoot-demo.XXXXXX")
tail_dir=$(mktemp -d /dev/shm/offshoot-demo.XXXXXX)
log="$work/log"
writer=
daemon=
guest=
# Where to complain, whatever the step that failed had redirected.
exec 3>&2

stop_writer() {
    if [[ -n $writer ]]; then
        kill -9 -- "-$writer" 2>/dev/null || true
        wait "$writer" 2>/dev/null || true
        writer=
    fi
}

stop_processes() {
    stop_writer
    for process in $guest $daemon; do
        kill -9 "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
}

finish() {
    local code=$?
    trap - EXIT
    stop_processes
    if ((code != 0)); then
        echo >&3
        tail -n 30 "$log" "$work"/{daemon.log,qemu.log,console} 2>/dev/null >&3 || true
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
    start=$(now_ms)
    "$@" >>"$log" 2>&1
    local took=$(($(now_ms) - start))
    printf '  %3d.%02d s  %s\n' $((took / 1000)) $((took % 1000 / 10)) "$what"
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

# --- A guest on the daemon ---

# Whether this machine can run a guest; if not, `why_no_guest` says why.
can_run_guest() {
    if ! type -P qemu-system-x86_64 >/dev/null; then
        why_no_guest="there is no qemu-system-x86_64 here"
    elif ! image=$("$top/tests/guest/build.sh" 2>"$work/image.log"); then
        cat "$work/image.log" >>"$log"
        why_no_guest=$(tail -n 1 "$work/image.log")
    else
        return 0
    fi
    return 1
}

import_system() {
    "$top/tests/guest/build.sh" disk "$work/system.raw"
    offshoot disk import "$work/system.raw" system
    offshoot disk seal system
    offshoot disk create web1 --parent system
    offshoot disk create data --size 256M
}

start_daemon() {
    "${offshoot%/*}/blockd" --store "$work/store" --api "$work/api.sock" >>"$work/daemon.log" 2>&1 &
    daemon=$!
    until offshoot daemon status 2>/dev/null; do
        kill -0 "$daemon"
        sleep 0.05
    done
}

attach_disks() {
    offshoot disk attach web1 --socket "$work/web1.sock"
    offshoot disk attach data --socket "$work/data.sock" --queues 2
}

# Hardware when a guest kernel runs on it: /dev/kvm alone does not say so. QEMU 9.2 and newer
# look for a daemon that went away more often than once a second.
choose_emulator() {
    accel=(-accel 'tcg,thread=multi' -cpu qemu64)
    by="emulated processors"
    if grep -qwE 'svm|vmx' /proc/cpuinfo && [[ -r /dev/kvm && -w /dev/kvm ]]; then
        accel=(-accel kvm -cpu host)
        by="KVM"
    fi
    local version
    version=$(qemu-system-x86_64 --version | sed -nE 's/.*version ([0-9]+\.[0-9]+).*/\1/p')
    reconnect="reconnect=1"
    if [[ $(printf '%s\n' 9.2 "$version" | sort -V | head -n 1) == 9.2 ]]; then
        reconnect="reconnect-ms=100"
    fi
}

vhost_disk() { # NAME QUEUES
    disks+=(-chardev "socket,id=$1,path=$work/$1.sock,$reconnect"
        -device "vhost-user-blk-pci,chardev=$1,num-queues=$2")
}

# The guest's memory is shared: the daemon reads and writes it itself. Its second serial line takes
# commands, see tests/guest/init.
boot_guest() {
    mkfifo "$work/line.in" "$work/line.out"
    # Both ends stay open here, so that neither side waits for the other to open it.
    exec {to_guest}<>"$work/line.in" {from_guest}<>"$work/line.out"
    disks=()
    vhost_disk web1 1
    vhost_disk data 2
    qemu-system-x86_64 "${accel[@]}" -nodefaults -no-user-config -display none -no-reboot \
        -machine q35,memory-backend=memory -smp 2 -m 256M \
        -object memory-backend-memfd,id=memory,size=256M,share=on \
        -serial "file:$work/console" -serial "pipe:$work/line" "${disks[@]}" \
        -kernel "$image/vmlinuz" -initrd "$image/initramfs.cpio" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off root=/dev/vda" \
        </dev/null >"$work/qemu.log" 2>&1 &
    guest=$!
    local line=
    until [[ $line == ready ]]; do
        read -r -t "$guest_limit" -u "$from_guest" line
    done
    in_guest 'grep "^/dev/vda / ext4 rw" /proc/mounts'
}

in_guest() { # COMMAND: runs a line of shell there, and shows what it says
    local id code bytes text
    kill -0 "$guest"
    echo "1 ${1//$'\n'/ }" >&"$to_guest"
    read -r -t "$guest_limit" -u "$from_guest" id code bytes
    text=
    if ((bytes > 0)); then
        LC_ALL=C IFS= read -r -t "$guest_limit" -N "$bytes" -u "$from_guest" text
    fi
    echo "guest: $1: $code: $text"
    [[ $id == 1 && $code == 0 ]]
}

use_file_system() {
    in_guest 'mke2fs -q -t ext4 /dev/vdb && mount /dev/vdb /mnt'
    in_guest 'cp -r /bin /usr /mnt; sync; cd / && find bin usr -type f |
        xargs sha256sum >/run/copied'
    in_guest "$forget_cache; cd /mnt && sha256sum -c /run/copied >/dev/null"
}

# Two writers, one with and one without the guest's page cache. The checksum of a file is noted in
# the guest's memory, once the file was written and synced.
start_writers() {
    local writer flags
    for writer in 1 2; do
        flags=conv=fsync
        ((writer == 1)) || flags=oflag=direct
        in_guest "(i=0; while [ ! -e /run/stop ]; do f=w$writer-\$((i % 32)); i=\$((i + 1));
            dd if=/dev/urandom of=/run/new$writer bs=1M count=1 || exit;
            dd if=/run/new$writer of=/mnt/\$f bs=64k $flags || exit;
            (cd /run; sha256sum <new$writer | sed s/-/\$f/ >sum-\$f; echo \$f >>rounds);
            done; touch /run/done$writer) >/run/log$writer 2>&1 &"
    done
}

rounds() { in_guest 'wc -l </run/rounds' | sed 's/.*: //'; }

# Waits until the guest has written again, so that every kill hits a working guest.
kill_daemon() {
    local before now end=$((SECONDS + guest_limit))
    before=$(rounds)
    now=$before
    while ((now == before)); do
        ((SECONDS < end))
        sleep 0.05
        now=$(rounds)
    done
    kill -9 "$daemon"
    wait "$daemon" 2>/dev/null || true
    daemon=
    sleep 0.3
    start_daemon
}

kill_daemon_in_mid_write() {
    local kill
    in_guest 'touch /run/rounds'
    start_writers
    for ((kill = 0; kill < daemon_kills; kill++)); do
        kill_daemon
    done
    in_guest 'touch /run/stop; until [ -e /run/done1 ] && [ -e /run/done2 ]; do sleep 0.1; done'
    written=$(rounds)
}

verify_in_guest() {
    in_guest '! find /mnt -maxdepth 1 -name "w*" ! -size 2048 | grep .'
    in_guest "$forget_cache; cd /mnt && cat /run/sum-* | sha256sum -c && sha256sum -c /run/copied"
}

power_off() {
    in_guest 'umount /mnt && mount -o remount,ro /'
    # It answers no more.
    echo '1 poweroff -f' >&"$to_guest"
    local waited
    for ((waited = 0; waited < guest_limit * 10; waited++)); do
        kill -0 "$guest" 2>/dev/null || break
        sleep 0.1
    done
    ((waited < guest_limit * 10))
    wait "$guest"
    guest=
}

stop_daemon() {
    offshoot disk detach web1
    offshoot disk detach data
    offshoot daemon stop
    wait "$daemon"
    daemon=
}

check_disks() {
    offshoot disk compare system "$work/system.raw"
    offshoot disk scrub system
    local disk
    for disk in web1 data; do
        offshoot disk check "$disk"
        offshoot disk export "$disk" "$work/$disk.raw"
        e2fsck -fn "$work/$disk.raw"
    done
}

show_guest() {
    # Reading back must reach the disk: the guest gives up its own copy of it.
    forget_cache='sync; echo 3 >/proc/sys/vm/drop_caches'
    choose_emulator
    echo "The daemon, and a guest on it"
    step "imported a Linux system as disk system, sealed it, made its child web1" import_system
    step "started blockd" start_daemon
    step "it serves web1, and an empty disk, to virtual machines" attach_disks
    step "booted Linux in QEMU ($by), its root on web1" boot_guest
    step "the guest made a file system, and reads back what it wrote" use_file_system
    show disk show web1
    step "killed blockd under the writing guest, $daemon_kills times" kill_daemon_in_mid_write
    step "the guest went on ($written more files), and reads what it wrote" verify_in_guest
    step "the guest shut down" power_off
    step "stopped blockd" stop_daemon
    step "disks and file systems are clean, and system did not change" check_disks
}

main() {
    offshoot=${OFFSHOOT:-}
    if [[ -z $offshoot ]]; then
        doing="cargo build"
        cargo build ${CI:+--locked} --quiet --release --package offshoot --package blockd \
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
    fi
    show store df
    local took=$(($(now_ms) - start))
    echo "Shown in $((took / 1000)) s:"
    echo "  - import, seal, child, export: the contents are what QEMU's tools read"
    echo "  - $kills kills of a writer in mid-write: $acknowledged acknowledged writes, all there"
    if [[ -n $why_no_guest ]]; then
        echo "NOT shown, because $why_no_guest:"
        echo "  - a guest on the daemon, and kills of the daemon under it"
    else
        echo "  - a Linux guest booted from a child of a sealed disk, over vhost-user"
        echo "  - $daemon_kills kills of the daemon under the writing guest, which went on and" \
            "reads what it wrote"
    fi
    echo "Nothing is left behind."
}

main
