#!/bin/bash
# Makes what the test guest boots from, out of distribution packages and this machine's tools.
#
#   tests/guest/build.sh             prints the directory with vmlinuz, initramfs.cpio (busybox,
#                                    drivers, file system tools) and, if this machine has fio,
#                                    initramfs-fio.cpio (the same with fio)
#   tests/guest/build.sh disk FILE   makes FILE a raw disk with an ext4 system, to be booted with
#                                    that kernel and initramfs and `root=/dev/vda`
#
# The result is kept under the target directory by the content of all inputs, so it is made once and
# made again when a package, a tool or this file changes. Exit code 1, with the reason, when a
# package or a tool is missing. The same inputs give the same initramfs.

set -euo pipefail
shopt -s inherit_errexit

PATH="$PATH:/usr/sbin:/sbin"
export LC_ALL=C TZ=UTC SOURCE_DATE_EPOCH=1
umask 022

here=$(cd "$(dirname "$0")" && pwd)
cache="${CARGO_TARGET_DIR:-$here/../../target}/guest"

tools=(sh mke2fs e2fsck blkdiscard fsfreeze fstrim sha256sum)
optional_tools=(mkfs.xfs xfs_repair ip)
modules=(virtio_pci virtio_mmio virtio_blk virtio_console virtio_rng loop xfs)
# For the nested lab. Some distributions keep them in another package, or in the kernel.
optional_modules=(kvm_amd button evdev tun virtio_net)

die() {
    echo "guest: $*" >&2
    exit 1
}

place_of() { type -P "$1" || true; }

# The files that the programs need besides themselves.
libraries() { # PROGRAM...
    ldd "$@" | sed -nE 's/^\s*(.* => )?(\/[^ ]+) \(0x.*/\2/p' | sort -u
}

programs=()
find_programs() {
    local tool
    for tool in cpio depmod modprobe dpkg-deb ldd "${tools[@]}"; do
        [[ -n $(place_of "$tool") ]] || die "no $tool on this machine"
    done
    for tool in "${tools[@]}" "${optional_tools[@]}"; do
        programs+=("$(place_of "$tool")")
    done
    mapfile -t programs < <(printf '%s\n' "${programs[@]}" | sed '/^$/d')
    mapfile -t all_programs < <(printf '%s\n' "${programs[@]}" "$(place_of fio)" | sed '/^$/d')
}

key() {
    {
        sha256sum "$here/init" "$here/build.sh" "${packages[@]}"
        # shellcheck disable=SC2046 # one file a word
        stat -L -c '%n %s %Y' "${all_programs[@]}" $(libraries "${all_programs[@]}")
    } | sha256sum | cut -c1-16
}

unpack() {
    local package
    mkdir "$work/system"
    for package in "${packages[@]}"; do
        dpkg-deb -x "$package" "$work/system"
    done
    # Kernels differ in how they pack their modules; the guest takes them as they are.
    find "$work/system" -name '*.ko.xz' -exec xz -dq {} +
    find "$work/system" -name '*.ko.zst' -exec zstd -dq --rm {} +
    kernel=$(find "$work/system/boot" -name 'vmlinuz-*')
    version=${kernel##*/vmlinuz-}
    # Where modprobe looks, also on a machine whose packages put them under /usr.
    if [[ ! -d $work/system/lib/modules ]]; then
        mkdir -p "$work/system/lib"
        mv "$work/system/usr/lib/modules" "$work/system/lib/modules"
    fi
    depmod -b "$work/system" "$version"
}

# busybox under its names, the init, the tools and their libraries; no drivers.
make_tree() { # DIR PROGRAM...
    local tree=$1 busybox name
    shift
    mkdir -p "$tree"/{bin,sbin,usr/bin,usr/sbin,dev,proc,sys,run,tmp,mnt,new,etc}
    busybox=$(find "$work/system" -path '*bin/busybox')
    [[ $busybox == "$tree/bin/busybox" ]] || cp "$busybox" "$tree/bin/busybox"
    for name in $("$busybox" --list); do
        [[ $name == busybox ]] || ln -sf /bin/busybox "$tree/bin/$name"
    done
    cp "$here/init" "$tree/sbin/init"
    chmod 755 "$tree/sbin/init" "$tree/bin/busybox"
    copy_programs "$tree" "$@"
    cp /etc/mke2fs.conf "$tree/etc/mke2fs.conf"
}

copy_programs() { # DIR PROGRAM...
    local tree=$1 program library
    shift
    for program in "$@"; do
        # Not under busybox's name for it.
        rm -f "$tree/bin/${program##*/}"
        cp -L "$program" "$tree/usr/bin/${program##*/}"
    done
    for library in $(libraries "$@"); do
        mkdir -p "$tree${library%/*}"
        cp -L "$library" "$tree$library"
    done
}

# Uncompressed: an emulated processor copies much faster than it inflates.
archive() { # DIR FILE
    find "$1" -exec touch -h -d @1 {} +
    (cd "$1" && find . -mindepth 1 -print0 | sort -z |
        cpio --quiet -0 -o -H newc --reproducible -R 0:0) >"$2"
}

make_initramfs() {
    local tree="$work/initramfs" file
    make_tree "$tree" "${programs[@]}"
    cp "$here/init" "$tree/init"
    chmod 755 "$tree/init"
    for file in $({
        modprobe -d "$work/system" -S "$version" --show-depends -a "${modules[@]}"
        modprobe -d "$work/system" -S "$version" --show-depends -aq "${optional_modules[@]}" || true
    } | sed -n 's/^insmod //p' | sort -u); do
        install -D -m 644 "$file" "$tree${file#"$work/system"}"
    done
    cp "$work/system/lib/modules/$version"/modules.{builtin,builtin.modinfo,order} "$tree/lib/modules/$version/"
    depmod -b "$tree" "$version"
    archive "$tree" "$work/out/initramfs.cpio"
    if ((${#all_programs[@]} > ${#programs[@]})); then
        copy_programs "$tree" "${all_programs[@]}"
        archive "$tree" "$work/out/initramfs-fio.cpio"
    fi
    cp "$kernel" "$work/out/vmlinuz"
}

# A system on a disk: the packages as they are unpacked, and the tools.
make_disk() { # FILE
    local tree="$work/system"
    make_tree "$tree" "${programs[@]}"
    rm -f "$1"
    mke2fs -q -t ext4 -L offshoot-guest -E root_owner=0:0 -d "$tree" "$1" 512M >/dev/null
}

main() {
    find_programs
    mapfile -t packages < <("$here/packages.sh")
    [[ -n ${packages[*]} ]] || die "the packages are not there: run tests/guest/packages.sh --get"
    local result
    result="$cache/$(key)"
    exec 9>"$cache/lock"
    flock 9
    work=$(mktemp -d "$cache/work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    if [[ ${1-} == disk ]]; then
        unpack
        make_disk "$2"
    elif [[ ! -d $result ]]; then
        mkdir "$work/out"
        unpack
        make_initramfs
        mv "$work/out" "$result"
    fi
    [[ ${1-} == disk ]] || realpath "$result"
}

main "$@"
