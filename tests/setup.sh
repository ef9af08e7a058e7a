#!/bin/bash
# Gets a Debian or Ubuntu machine ready for the tests.
#
# Relied on: whether a tool is there is decided by looking for the tool, never for its package, so a
# machine that has a tool from elsewhere (backports, a local build) is left alone. When everything
# is there, no package manager is called and no network is used.
#
# Exit code: 0 when all required tools are there, 1 when one is missing and could not be installed.
# Tests that lack an optional tool say so and are counted as skipped.

set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)

# A plain user's PATH often lacks the administrator's directories.
PATH="$PATH:/usr/sbin:/sbin"

# need: required | optional; the tool; its package; what it is for.
tools() {
    cat <<'LIST'
required cc         build-essential to link Rust programs
required c++        build-essential to build the fuzz engine
required qemu-img   qemu-utils      to make and compare real disk images
required qemu-io    qemu-utils      to fill real disk images
required mke2fs     e2fsprogs       to make file systems to import
required e2fsck     e2fsprogs       to check exported file systems
optional mkfs.xfs   xfsprogs        to test a store on a file system with reflinks
optional nbdinfo    libnbd-bin      to look at NBD exports with a client that is not ours
optional nbdcopy    libnbd-bin      to copy disks over NBD
optional ip         iproute2        to test network cards of machines (as root)
optional losetup    mount           to test full, read-only and reflink file systems (as root)
optional qemu-system-x86_64 qemu-system-x86 to boot a real guest from our disks
optional cpio       cpio            to make that guest
optional depmod     kmod            to make that guest
optional fio        fio             to load disks, in the guest and over NBD
LIST
}

missing() { # NEED
    while read -r need tool package purpose; do
        if [[ $need == "$1" ]] && ! type -P "$tool" >/dev/null; then
            echo "$tool $package $purpose"
        fi
    done < <(tools)
}

packages() { # NEED...
    for need in "$@"; do missing "$need"; done | cut -d' ' -f2 | sort -u | tr '\n' ' '
}

say() { echo "setup: $*" >&2; }

say_missing() {
    for need in required optional; do
        while read -r tool _ purpose; do
            say "$need tool $tool is missing; it is used $purpose"
        done < <(missing "$need")
    done
}

# --no-remove: a package that could only be installed by removing another one is refused, and the
# machine stays as it is.
apt_install=(apt-get install -y --no-install-recommends --no-remove)

apt_options=(-q -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=120)

install() { # PACKAGE...
    export DEBIAN_FRONTEND=noninteractive
    apt-get "${apt_options[@]}" update >&2 </dev/null ||
        say "the package lists could not be refreshed"
    # One after the other: an optional package that cannot be had must not keep out the rest.
    for package in "$@"; do
        if [[ $package == qemu-system-x86 ]]; then
            install_emulator
        else
            install_one "$package"
        fi || say "could not install $package"
    done
}

install_one() { # PACKAGE [OPTION...]
    local package=$1
    shift
    "${apt_install[@]}" "${apt_options[@]}" "$@" "$package" >&2 </dev/null
}

# The emulator and qemu-utils share packages and must be of one version. Where qemu-utils came from
# Debian's backports and that suite is not in the machine's list, it is looked up for this one
# installation only; the list stays as it is.
install_emulator() {
    local codename version lists
    version=$(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null || true)
    if [[ $version != *~bpo* ]] || apt-cache madison qemu-system-x86 | grep -qF " $version "; then
        install_one qemu-system-x86
        return
    fi
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    say "qemu-utils is from $codename-backports; looking there for qemu-system-x86"
    lists=$(mktemp -d)
    mkdir -p "$lists/parts" "$lists/lists/partial"
    cp /etc/apt/sources.list.d/* "$lists/parts/" 2>/dev/null || true
    cat >"$lists/parts/offshoot-backports.sources" <<SOURCE
Types: deb
URIs: http://deb.debian.org/debian
Suites: $codename-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCE
    local here=(-o "Dir::Etc::sourceparts=$lists/parts" -o "Dir::State::lists=$lists/lists")
    # apt's own user reads them.
    chmod -R a+rX "$lists"
    apt-get "${apt_options[@]}" "${here[@]}" update >&2 </dev/null || true
    local code=0
    install_one qemu-system-x86 "${here[@]}" -t "$codename-backports" || code=1
    rm -rf "$lists"
    return $code
}

# What the test guest is made of is downloaded once and never installed.
get_guest() {
    if type -P apt-get qemu-system-x86_64 >/dev/null && ! "$top/tests/guest/packages.sh" >/dev/null
    then
        "$top/tests/guest/packages.sh" --get >/dev/null ||
            say "no packages for the test guest; its tests will be skipped and counted"
    fi
}

main() {
    if ! type -P cargo >/dev/null; then
        say "cargo is missing: install Rust first (https://rustup.rs)"
        exit 1
    fi
    local required optional command
    required=$(packages required)
    optional=$(packages optional)
    if [[ -z $required$optional ]]; then
        get_guest
        return
    fi
    say_missing
    command="apt-get update && ${apt_install[*]} $(packages required optional)"
    if ! type -P apt-get >/dev/null; then
        say "this machine has no apt-get; install these tools in its own way"
    elif [[ $EUID != 0 ]]; then
        say "as root, run: ${command% }"
    else
        say "running: ${command% }"
        # shellcheck disable=SC2086 # a list of package names
        install $required $optional
    fi
    if [[ -n $(packages required) ]]; then
        say "cannot go on without: $(missing required | cut -d' ' -f1 | tr '\n' ' ')"
        exit 1
    fi
    if [[ -n $(packages optional) ]]; then
        say "going on without the optional tools; their tests will be skipped and counted"
    fi
    get_guest
}

main "$@"
