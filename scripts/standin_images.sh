#!/usr/bin/env bash
# Base images for tests where no registry can be reached: the names and tags that Dockerfile and docker-compose.yml
# ask for, put together from Debian packages, PyPI's nats-server and this machine's Rust toolchain.
#
#   scripts/standin_images.sh            builds those that are missing
#   scripts/standin_images.sh --remove   removes the ones it built
#
# They stand in for the official images in tests, nothing else: don't run a fleet on them. They have a label by which they are known.
# Needs Docker, apt-get, dpkg-deb and, for the builder, cargo with the crates of Cargo.lock (fetched if they can be).
set -euo pipefail
cd "$(dirname "$0")/.."

LABEL=flotilla.standin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf 'standin_images.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# The image named in ARG $1 of the Dockerfile.
arg() { sed -n "s/^ARG $1=//p" Dockerfile; }
# The image of docker-compose.yml that begins with $1:
service() { grep -oE "image: $1:[^ ]+" docker-compose.yml | cut -d ' ' -f 2; }

# Downloads packages with all they depend on, as if nothing were installed, and unpacks them into folder $1.
packages() {
    local root=$1 deb name
    shift
    mkdir -p "$root/debs/partial" "$root/fs"/usr/{bin,sbin,lib,lib64}
    : >"$root/status"
    # Debian's packages of today still name both places.
    for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/fs/$name"; done
    apt-get -q -y -o Dir::State::status="$root/status" -o Dir::Cache::archives="$root/debs" -o Debug::NoLocking=1 \
        -o APT::Sandbox::User=root --no-install-recommends --download-only install "$@" >"$root/apt.log" 2>&1 || {
        tail -n 5 "$root/apt.log" >&2
        die "apt-get could not fetch: $*; try apt-get update"
    }
    for deb in "$root"/debs/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink --no-same-owner -C "$root/fs"
    done
    mkdir -p "$root/fs"/{tmp,root,proc,sys,dev,data}
    chmod 1777 "$root/fs/tmp"
}

# What the packages' own scripts would have done, as far as these images need it.
finish() {
    local fs=$1
    if [ -d "$fs/usr/share/base-passwd" ]; then
        cp "$fs/usr/share/base-passwd/passwd.master" "$fs/etc/passwd"
        cp "$fs/usr/share/base-passwd/group.master" "$fs/etc/group"
    fi
    [ -e "$fs/usr/bin/awk" ] || ln -s mawk "$fs/usr/bin/awk"
    [ -e "$fs/usr/bin/sh" ] || ln -s dash "$fs/usr/bin/sh"
    rm -rf "$fs"/usr/share/{doc,man,locale,info,lintian}
    ldconfig -r "$fs"
}

# Makes an image named $1 of folder $2; the rest are Dockerfile instructions for its settings.
import() {
    local name=$1 fs=$2 change=(--change "LABEL $LABEL=1")
    shift 2
    while [ $# -gt 0 ]; do change+=(--change "$1"); shift; done
    tar -c --owner=0 --group=0 --numeric-owner -C "$fs" . | docker import "${change[@]}" - "$name" >/dev/null
    say "$name built"
}

BASE=(bash coreutils dash grep sed findutils mawk tar gzip libc-bin base-passwd base-files libgcc-s1)

runtime() {
    packages "$work/runtime" "${BASE[@]}"
    finish "$work/runtime/fs"
    import "$1" "$work/runtime/fs" 'CMD ["bash"]'
}

redis() {
    packages "$work/redis" "${BASE[@]}" redis-server
    finish "$work/redis/fs"
    import "$1" "$work/redis/fs" 'WORKDIR /data' 'CMD ["redis-server"]'
}

nats() {
    local fs=$work/nats/fs applet NATS_SERVER
    eval "$(scripts/servers.sh | grep ^NATS_SERVER=)"
    packages "$work/nats" busybox-static ca-certificates
    for applet in sh wget cat ls grep sleep; do ln -sf busybox "$fs/bin/$applet"; done
    mkdir -p "$fs/usr/local/bin"
    cp "$NATS_SERVER" "$fs/usr/local/bin/nats-server"
    import "$1" "$fs" 'CMD ["nats-server"]'
}

# The toolchain and the crates, where the official image has rustup and a network.
builder() {
    local fs=$work/builder/fs sysroot host cargo_home
    command -v cargo >/dev/null || die "cargo is needed for a stand-in of $1"
    sysroot=$(rustc --print sysroot)
    host=$(rustc -vV | sed -n 's/^host: //p')
    cargo_home=${CARGO_HOME:-$HOME/.cargo}
    cargo fetch --quiet --locked --target "$host" || die "the crates of Cargo.lock are not here and can't be fetched"
    packages "$work/builder" "${BASE[@]}" gcc g++ libc6-dev make ca-certificates
    finish "$fs"
    ln -sf gcc "$fs/usr/bin/cc"
    ln -sf g++ "$fs/usr/bin/c++"
    # The bundle of certificates is put together by the package's script.
    cat "$fs"/usr/share/ca-certificates/*/*.crt >"$fs/etc/ssl/certs/ca-certificates.crt"
    mkdir -p "$fs/usr/local"/{bin,lib/rustlib} "$fs/usr/local/cargo/registry"
    cp -a "$sysroot/bin"/{cargo,rustc} "$fs/usr/local/bin/"
    cp -a "$sysroot/lib"/*.so* "$fs/usr/local/lib/"
    cp -a "$sysroot/lib/rustlib/$host" "$fs/usr/local/lib/rustlib/"
    cp -a "$cargo_home/registry"/{index,cache} "$fs/usr/local/cargo/registry/"
    printf '[net]\noffline = true\n' >"$fs/usr/local/cargo/config.toml"
    # Anyone may build, as in the official image.
    chmod -R a+rwX "$fs/usr/local/cargo"
    import "$1" "$fs" 'ENV CARGO_HOME=/usr/local/cargo' 'ENV PATH=/usr/local/cargo/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin'
}

# Builds image $2 with function $1 unless there is an image of that name.
ensure() {
    [ -n "$2" ] || die "no image for $1 is named in Dockerfile and docker-compose.yml"
    if docker image inspect "$2" >/dev/null 2>&1; then return; fi
    "$1" "$2"
}

if [ "${1:-}" = --remove ]; then
    docker images --quiet --filter "label=$LABEL" | sort -u | xargs -r docker rmi --force >/dev/null
    exit
fi
ensure runtime "$(arg RUNTIME_IMAGE)"
ensure redis "$(service redis)"
ensure nats "$(service nats)"
ensure builder "$(arg BUILDER_IMAGE)"
