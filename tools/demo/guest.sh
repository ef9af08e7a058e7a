# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # the other parts use or set them
# The part of the demo that has a guest on the daemon, which is killed under it.
#
# Sourced by ../demo.sh, which has the helpers and the places. Guests have names; each has a serial
# line of its own that takes commands, see tests/guest/init.

# How often the daemon is killed under the guest, and how long a guest may take for one thing.
daemon_kills=3
guest_limit=90
# By name of the guest: its process, and the two ends of its line.
declare -A guests to_guest from_guest
# Reading back must reach the disk: the guest gives up its own copy of it.
forget_cache='sync; echo 3 >/proc/sys/vm/drop_caches'

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

attach_disk() { # NAME QUEUES
    offshoot disk attach "$1" --socket "$work/$1.sock" --queues "$2"
}

# The daemon may not have seen yet that the guest went.
detach_disk() { # NAME
    local end=$((SECONDS + guest_limit))
    until offshoot disk detach "$1"; do
        ((SECONDS < end))
        sleep 0.05
    done
}

attach_disks() {
    attach_disk web1 1
    attach_disk data 2
}

# Hardware when a guest kernel runs on it: /dev/kvm alone does not say so. QEMU 9.2 and newer
# look for a daemon that went away more often than once a second.
choose_emulator() {
    accel=(-accel 'tcg,thread=multi' -cpu qemu64)
    by="emulated processors"
    # The guest's init says why an emulated guest needs a loop device.
    root="root=/dev/vda root_via=loop"
    root_mounted=/dev/loop0
    if grep -qwE 'svm|vmx' /proc/cpuinfo && [[ -r /dev/kvm && -w /dev/kvm ]]; then
        accel=(-accel kvm -cpu host)
        by="KVM"
        root="root=/dev/vda"
        root_mounted=/dev/vda
    fi
    local version
    version=$(qemu-system-x86_64 --version | sed -nE 's/.*version ([0-9]+\.[0-9]+).*/\1/p')
    reconnect="reconnect=1"
    if [[ $(printf '%s\n' 9.2 "$version" | sort -V | head -n 1) == 9.2 ]]; then
        reconnect="reconnect-ms=100"
    fi
}

# Boots from the first disk. The guest's memory is shared: the daemon reads and writes it itself.
boot_guest() { # GUEST PROCESSORS MEMORY DISK:QUEUES...
    local name=$1 processors=$2 memory=$3 line='' disk disks=() to from
    shift 3
    mkfifo "$work/$name.in" "$work/$name.out"
    # Both ends stay open here, so that neither side waits for the other to open it.
    exec {to}<>"$work/$name.in" {from}<>"$work/$name.out"
    to_guest[$name]=$to
    from_guest[$name]=$from
    for disk in "$@"; do
        disks+=(-chardev "socket,id=${disk%:*},path=$work/${disk%:*}.sock,$reconnect"
            -device "vhost-user-blk-pci,chardev=${disk%:*},num-queues=${disk#*:}")
    done
    qemu-system-x86_64 "${accel[@]}" -nodefaults -no-user-config -display none -no-reboot \
        -machine q35,memory-backend=memory -smp "$processors" -m "$memory" \
        -object "memory-backend-memfd,id=memory,size=$memory,share=on" \
        -serial "file:$work/$name.console" -serial "pipe:$work/$name" "${disks[@]}" \
        -kernel "$image/vmlinuz" -initrd "$image/initramfs.cpio" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off $root" \
        </dev/null >"$work/$name.qemu.log" 2>&1 &
    guests[$name]=$!
    until [[ $line == ready ]]; do
        read -r -t "$guest_limit" -u "$from" line
    done
    in_guest "$name" "grep '^$root_mounted / ext4 rw' /proc/mounts"
}

in_guest() { # GUEST COMMAND: runs a line of shell there, and shows what it says
    local id code bytes text from=${from_guest[$1]}
    kill -0 "${guests[$1]}"
    echo "1 ${2//$'\n'/ }" >&"${to_guest[$1]}"
    read -r -t "$guest_limit" -u "$from" id code bytes
    text=
    if ((bytes > 0)); then
        LC_ALL=C IFS= read -r -t "$guest_limit" -N "$bytes" -u "$from" text
    fi
    echo "guest $1: $2: $code: $text"
    [[ $id == 1 && $code == 0 ]]
}

answer_of() { # GUEST COMMAND: what it says there, one line
    in_guest "$1" "$2" | sed "s/.*: //"
}

use_file_system() {
    in_guest web1 'mke2fs -q -t ext4 /dev/vdb && mount /dev/vdb /mnt'
    in_guest web1 'cp -r /bin /usr /mnt; sync; cd / && find bin usr -type f |
        xargs sha256sum >/run/copied'
    in_guest web1 "$forget_cache; cd /mnt && sha256sum -c /run/copied >/dev/null"
}

# Two writers, one with and one without the guest's page cache. The checksum of a file is noted in
# the guest's memory, once the file was written and synced.
start_writers() { # PAUSE: seconds between two files of a writer
    local writer flags
    in_guest web1 'rm -f /run/stop /run/done* /run/rounds; touch /run/rounds'
    for writer in 1 2; do
        flags=conv=fsync
        ((writer == 1)) || flags=oflag=direct
        in_guest web1 "(i=0; while [ ! -e /run/stop ]; do f=w$writer-\$((i % 32)); i=\$((i + 1));
            dd if=/dev/urandom of=/run/new$writer bs=1M count=1 || exit;
            dd if=/run/new$writer of=/mnt/\$f bs=64k $flags || exit;
            (cd /run; sha256sum <new$writer | sed s/-/\$f/ >sum-\$f; echo \$f >>rounds);
            sleep $1; done; touch /run/done$writer) >/run/log$writer 2>&1 &"
    done
}

stop_writers() {
    in_guest web1 'touch /run/stop;
        until [ -e /run/done1 ] && [ -e /run/done2 ]; do sleep 0.1; done'
    written=$(rounds)
}

rounds() { answer_of web1 'wc -l </run/rounds'; }

# Waits until the guest has written again: what comes next hits a working guest.
await_writes() {
    local before now end=$((SECONDS + guest_limit))
    before=$(rounds)
    now=$before
    while ((now == before)); do
        ((SECONDS < end))
        sleep 0.05
        now=$(rounds)
    done
}

kill_daemon() {
    await_writes
    kill -9 "$daemon"
    wait "$daemon" 2>/dev/null || true
    daemon=
    sleep 0.3
    start_daemon
}

kill_daemon_in_mid_write() {
    local kill
    start_writers 0
    for ((kill = 0; kill < daemon_kills; kill++)); do
        kill_daemon
    done
    stop_writers
}

verify_in_guest() {
    in_guest web1 '! find /mnt -maxdepth 1 -name "w*" ! -size 2048 | grep .'
    in_guest web1 "$forget_cache; cd /mnt && cat /run/sum-* | sha256sum -c &&
        sha256sum -c /run/copied"
}

power_off() { # GUEST
    local waited to=${to_guest[$1]} from=${from_guest[$1]}
    in_guest "$1" 'umount /mnt && mount -o remount,ro /'
    # It answers no more.
    echo '1 poweroff -f' >&"$to"
    for ((waited = 0; waited < guest_limit * 20; waited++)); do
        kill -0 "${guests[$1]}" 2>/dev/null || break
        sleep 0.05
    done
    ((waited < guest_limit * 20))
    wait "${guests[$1]}"
    unset "guests[$1]"
    exec {to}>&- {from}>&-
}

stop_daemon() {
    detach_disk web1
    detach_disk data
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
    choose_emulator
    echo "The daemon, and a guest on it"
    step "imported a Linux system as disk system, sealed it, made its child web1" import_system
    step "started blockd" start_daemon
    step "it serves web1, and an empty disk, to virtual machines" attach_disks
    step "booted Linux in QEMU ($by), its root on web1" boot_guest web1 2 256M web1:1 data:2
    step "the guest made a file system, and reads back what it wrote" use_file_system
    show disk show web1
    step "killed blockd under the writing guest, $daemon_kills times" kill_daemon_in_mid_write
    step "the guest went on ($written more files), and reads what it wrote" verify_in_guest
}

show_end_of_guest() {
    step "the guest shut down" power_off web1
    step "stopped blockd" stop_daemon
    step "disks and file systems are clean, and system did not change" check_disks
}
