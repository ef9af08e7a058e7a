#!/bin/bash
# Finds the packages that the test guest is made of, and gets them if asked: tests/guest/packages.sh
# [--get] prints their files, one a line; exit code 1 when they are not there.
#
# The kernel is the distribution's, unpacked and never installed: it must not become this machine's.
# The files stay under the target directory, so a network is needed once.

set -euo pipefail

top=$(cd "$(dirname "$0")/../.." && pwd)
cache="${CARGO_TARGET_DIR:-$top/target}/guest/packages"

# Debian's and Ubuntu's small kernels for virtual machines.
kernels=(linux-image-cloud-amd64 linux-image-virtual)

have() { [[ -e $cache/complete ]]; }

depends() { # PACKAGE PATTERN: the first package that it depends on whose name matches
    apt-cache depends --important "$1" 2>/dev/null |
        sed -n "s/^ *Depends: *\\($2\\)\$/\\1/p" | head -n 1
}

get() {
    local kernel='' image modules candidate
    for candidate in "${kernels[@]}"; do
        kernel=$(depends "$candidate" 'linux-image-[0-9].*')
        [[ -z $kernel ]] || break
    done
    if [[ -z $kernel ]]; then
        echo "guest: no kernel package is known here (looked for: ${kernels[*]})" >&2
        return 1
    fi
    image=$(mktemp -d "$cache.XXXXXX")
    modules=$(depends "$kernel" 'linux-modules-[0-9].*')
    echo "guest: getting $kernel ${modules:+$modules }busybox-static" >&2
    # shellcheck disable=SC2086 # an empty name is no package
    if ! (cd "$image" && apt-get -q -o Acquire::Retries=1 -o APT::Sandbox::User=root \
        download "$kernel" $modules busybox-static >&2 </dev/null); then
        rm -rf "$image"
        return 1
    fi
    touch "$image/complete"
    rm -rf "$cache"
    mv "$image" "$cache"
}

mkdir -p "$(dirname "$cache")"
exec 9>"$cache.lock"
flock 9
if ! have && [[ ${1-} == --get ]]; then
    get
fi
have
printf '%s\n' "$cache"/*.deb
