# shellcheck shell=bash
# shellcheck disable=SC2154 # the other parts set them
# The part of the demo that forks the disks of the running guest, boots its children, and flattens.
#
# Sourced by ../demo.sh, after guest.sh. The guest web1 writes all the time. Its two disks are
# forked together, and what tells one instant from another is this:
# - *pieces*: files on both disks, one more after each fork, so the children of fork N hold the
#   pieces 1 to N and no other;
# - *marks*: a number that grows, written and synced on the root, then on the second disk, then the
#   next one. At any one instant the second disk has the number of the root, or the one before it.

# Every fork makes two children, which start out alike.
forks=4
children=$((2 * forks))
pieces=0
# Per fork: microseconds that it took, that the guest waited, and marks before and after it.
fork_us=() pause_us=() first_mark=() last_mark=()
# Per child: milliseconds until it took commands, and until it was verified.
boot_ms=() verify_ms=()

field() { # NAME: the first number of that name in the JSON that comes in
    sed -nE "/^ *\"$1\": ([0-9]+),?\$/{s//\\1/p;q}"
}

ms() { # MICROSECONDS
    local tenths=$((($1 + 50) / 100))
    echo "$((tenths / 10)).$((tenths % 10))"
}

seconds() { # MILLISECONDS
    local tenths=$((($1 + 50) / 100))
    echo "$((tenths / 10)).$((tenths % 10))"
}

mib() { echo "$((($1 + (1 << 19)) >> 20)) MiB"; }

span() { # UNIT-FUNCTION NUMBER...: the smallest and the largest
    local unit=$1 sorted
    shift
    mapfile -t sorted < <(printf '%s\n' "$@" | sort -n)
    echo "$("$unit" "${sorted[0]}") to $("$unit" "${sorted[-1]}")"
}

depth() { offshoot disk show "$1" --json | field depth; }

# What never changes, so that a fork freezes it and a flatten has something to copy.
write_archive() {
    in_guest web1 'cp /run/copied /mnt/copied.sums; for i in 1 2 3 4 5 6; do
        find /mnt/bin /mnt/usr -type f | xargs cat || exit; done >/mnt/archive;
        sha256sum /mnt/archive >>/mnt/copied.sums; sync'
}

# The guest's memory has the mark that was synced last on both disks. Once all forks are made there
# is time between two marks, which leaves processors for the children.
start_marks() {
    in_guest web1 'echo 10000000 | tee /mark /mnt/mark >/run/mark; sync'
    in_guest web1 "(n=10000000; while [ ! -e /run/stop ]; do n=\$((n + 1));
        for f in /mark /mnt/mark; do echo \$n | dd of=\$f conv=notrunc,fsync || exit; done;
        echo \$n >/run/new-mark; mv /run/new-mark /run/mark;
        [ ! -e /run/forked ] || sleep 0.5; done; touch /run/done3) >/run/log3 2>&1 &"
}

mark() { answer_of web1 'cat /run/mark'; }

write_piece() {
    pieces=$((pieces + 1))
    in_guest web1 "for d in '' /mnt; do
        dd if=/dev/urandom of=\$d/piece-$pieces bs=64k count=8 || exit; done;
        sha256sum /piece-$pieces /mnt/piece-$pieces >/mnt/sums-$pieces; sync"
}

start_work() {
    write_archive
    start_writers 0.5
    start_marks
    write_piece
    await_writes
}

fork_disks() { # FORK, from 0
    local first=$((2 * $1 + 1)) second=$((2 * $1 + 2))
    first_mark[$1]=$(mark)
    offshoot disk fork web1 "web1-$first" "web1-$second" --with "data:data-$first,data-$second" \
        --flatten manual --json >"$work/fork.json"
    last_mark[$1]=$(mark)
    cat "$work/fork.json"
    fork_us[$1]=$(field took_us <"$work/fork.json")
    pause_us[$1]=$(field pause_us <"$work/fork.json")
    ((fork_us[$1] > 0 && pause_us[$1] > 0))
    write_piece
    await_writes
    ((fork + 1 < forks)) || in_guest web1 'touch /run/forked'
    detail=": $(ms "${fork_us[-1]}") ms, the guest waited for $(ms "${pause_us[-1]}") ms"
}

# The file system is what a power cut leaves: its journal is replayed, then it is clean.
verify_contents() { # CHILD FORK
    local name=child-$1 fork=$2 expected=() piece marks root second
    in_guest "$name" '{ e2fsck -p /dev/vdb || [ $? = 1 ]; } && e2fsck -fn /dev/vdb &&
        mount /dev/vdb /mnt'
    in_guest "$name" 'cd /mnt && sha256sum -c copied.sums >/dev/null && cat sums-* | sha256sum -c'
    for ((piece = 1; piece <= fork + 1; piece++)); do
        expected+=("piece-$piece")
    done
    in_guest "$name" "[ \"\$(cd / && echo piece-*)\" = '${expected[*]}' ] &&
        [ \"\$(cd /mnt && echo piece-*)\" = '${expected[*]}' ]"
    in_guest "$name" '! find / -xdev -name "own-*" | grep . && ! find /mnt -name "own-*" | grep .'
    marks=$(answer_of "$name" 'cat /mark /mnt/mark | xargs')
    root=${marks% *} second=${marks#* }
    echo "marks: $marks; fork: ${first_mark[$fork]} to ${last_mark[$fork]}"
    ((second == root || second == root - 1))
    ((second >= first_mark[fork] && root <= last_mark[fork] + 1))
}

# The child writes on its own, on both disks.
write_own() { # CHILD
    in_guest "child-$1" "dd if=/dev/urandom of=/run/own bs=64k count=8;
        for d in '' /mnt; do cp /run/own \$d/own-$1; done; $forget_cache;
        cmp /run/own /own-$1 && cmp /run/own /mnt/own-$1"
}

run_child() { # CHILD
    local name=child-$1 start booted
    start=$(now_ms)
    attach_disk "web1-$1" 1
    attach_disk "data-$1" 1
    boot_guest "$name" 1 128M "web1-$1:1" "data-$1:1"
    booted=$(now_ms)
    verify_contents "$1" $((($1 - 1) / 2))
    write_own "$1"
    boot_ms+=($((booted - start)))
    verify_ms+=($(($(now_ms) - booted)))
    power_off "$name"
    detach_disk "web1-$1"
    detach_disk "data-$1"
    await_writes
    detail=": booted in $(seconds "${boot_ms[-1]}") s, verified in $(seconds "${verify_ms[-1]}") s"
}

own_files_in() { # IMAGE
    debugfs -R 'ls -p /' "$1" | cut -d/ -f6 | grep '^own-'
}

# From outside, after all children ran: each one has what it wrote, and nothing of another.
check_children() {
    local child disk
    for ((child = 1; child <= children; child++)); do
        for disk in "web1-$child" "data-$child"; do
            offshoot disk check "$disk"
            offshoot disk export "$disk" "$work/$disk.raw"
            e2fsck -fn "$work/$disk.raw"
            [[ $(own_files_in "$work/$disk.raw") == "own-$child" ]]
            rm "$work/$disk.raw"
        done
    done
}

# Shows how far a job is until it ends, then what came of it in `result`.
watch_job() { # ID
    local state='' shown='' so_far total
    while [[ $state != "done" ]]; do
        offshoot job ls --json | sed -n "/^    \"id\": $1,\$/,/^  }/p" >"$work/job.json"
        state=$(sed -nE 's/^    "state": "(.*)",$/\1/p' "$work/job.json")
        [[ $state == running || $state == "done" ]]
        total=$(field total <"$work/job.json")
        so_far="$(mib "$(field "done" <"$work/job.json")") of $(mib "${total:-0}")"
        if [[ -n $total && $so_far != "$shown" ]]; then
            shown=$so_far
            echo "              $so_far" >&3
        fi
        sleep 0.2
    done
    cat "$work/job.json"
}

flatten() { # DISK TO
    local before after id copied took
    before=$(depth "$1")
    id=$(offshoot disk flatten "$1" --to "$2" --json | field id)
    watch_job "$id"
    after=$(depth "$1")
    ((before > after))
    copied=$(field copied <"$work/job.json")
    took=$(field took_ms <"$work/job.json")
    took=$((took > 0 ? took : 1))
    await_writes
    detail=": from $before segments below it to $after, $(mib "$copied") at"
    detail+=" $((copied / took / 1000)) MB/s"
    flattened+=("$1$detail")
}

stop_work() {
    stop_writers
    in_guest web1 'until [ -e /run/done3 ]; do sleep 0.1; done'
}

# The parent holds what it wrote, before and after the forks, and nothing of a child.
verify_parent() {
    verify_in_guest
    in_guest web1 'cat /mnt/sums-* | sha256sum -c && cmp /mark /mnt/mark && cmp /mark /run/mark'
    in_guest web1 "[ \$(ls -d /piece-* | wc -l) = $pieces ] &&
        [ \$(ls -d /mnt/piece-* | wc -l) = $pieces ]"
    in_guest web1 '! find / -xdev -name "own-*" | grep . && ! find /mnt -name "own-*" | grep .'
}

used() { offshoot store df --json | field used; }

# What was frozen by the forks goes with the last child that stands on it.
delete_children() {
    local child before after left
    before=$(used)
    for ((child = 1; child <= children; child++)); do
        offshoot disk rm "web1-$child"
        offshoot disk rm "data-$child"
    done
    after=$(used)
    # Each wrote 512 KiB to both of its disks.
    ((before - after >= children << 20))
    left=("$work"/store/*.seg)
    ((${#left[@]} == $(offshoot disk ls --json | grep -c '"segment":')))
    detail=": $(mib $((before - after))) given back, $(mib "$after") in use"
    given_back=$(mib $((before - after)))
}

show_forks() {
    local fork child
    flattened=()
    echo "The guest's disks, forked while it writes"
    step "the guest writes to both disks, and goes on doing so" start_work
    for ((fork = 0; fork < forks; fork++)); do
        step "fork $((fork + 1)) of web1 and data, 2 children each" fork_disks "$fork"
    done
    step "flattened data under the writing guest" flatten data nothing
    step "flattened web1 under the writing guest" flatten web1 base
    for ((child = 1; child <= children; child++)); do
        step "child $child of $children" run_child "$child"
    done
    step "each child has what it wrote and nothing of another, and is clean" check_children
    step "the guest stopped writing" stop_work
    step "it has all it wrote ($written files, $pieces pieces), nothing of a child" verify_parent
    step "deleted the children" delete_children
}

sum_up_forks() {
    local line
    echo "  - $forks forks of the writing guest's two disks, 2 children each:" \
        "$(span ms "${fork_us[@]}") ms, the guest waited for $(span ms "${pause_us[@]}") ms"
    echo "  - all $children children booted ($(span seconds "${boot_ms[@]}") s) and hold what the" \
        "guest had at one instant ($(span seconds "${verify_ms[@]}") s to verify)"
    for line in "${flattened[@]}"; do
        echo "  - flattened under the guest: $line"
    done
    echo "  - deleting the children gave $given_back back"
}
